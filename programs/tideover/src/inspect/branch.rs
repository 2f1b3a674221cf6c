//! Lines as a tree.

use std::io;
use std::io::Write;

/// Lines that are made as they are written, because there may be a million.
pub(super) type Lines<'a> = Box<dyn Fn(&mut dyn FnMut(&str)) + 'a>;

/// A line, and what hangs on it.
#[derive(Default)]
pub(super) struct Branch<'a> {
    line: String,
    twigs: Vec<Branch<'a>>,
    lines: Option<Lines<'a>>,
}

impl<'a> Branch<'a> {
    pub(super) fn new(line: impl Into<String>) -> Self {
        Self { line: line.into(), ..Self::default() }
    }

    /// With one more line on it.
    pub(super) fn with(mut self, twig: impl Into<Branch<'a>>) -> Self {
        self.push(twig);
        self
    }

    pub(super) fn push(&mut self, twig: impl Into<Branch<'a>>) {
        self.twigs.push(twig.into());
    }

    /// With lines on it, behind all twigs.
    pub(super) fn lines(&mut self, lines: Lines<'a>) {
        self.lines = Some(lines);
    }

    /// Writes it without a stem of its own, as the root of a tree.
    pub(super) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}", self.line)?;
        self.write_twigs(to, "")
    }

    fn write_twigs(&self, to: &mut dyn Write, stem: &str) -> io::Result<()> {
        let last = if self.lines.is_some() { None } else { self.twigs.len().checked_sub(1) };
        for (index, twig) in self.twigs.iter().enumerate() {
            let (joint, below) = if Some(index) == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            writeln!(to, "{stem}{joint}{}", twig.line)?;
            twig.write_twigs(to, &format!("{stem}{below}"))?;
        }
        let mut result = Ok(());
        if let Some(lines) = &self.lines {
            lines(&mut |line| {
                if result.is_ok() {
                    result = writeln!(to, "{stem}   {line}");
                }
            });
        }
        result
    }
}

impl From<String> for Branch<'_> {
    fn from(line: String) -> Self {
        Self::new(line)
    }
}

impl From<&str> for Branch<'_> {
    fn from(line: &str) -> Self {
        Self::new(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twigs_hang_on_their_branches() {
        let mut b = Branch::new("b").with("b1");
        b.lines(Box::new(|line| line("row")));
        let tree = Branch::new("root").with(Branch::new("a").with("a1").with("a2")).with(b);
        let mut text = Vec::new();
        tree.write(&mut text).unwrap();
        let wanted = "root\n├─ a\n│  ├─ a1\n│  └─ a2\n└─ b\n   ├─ b1\n      row\n";
        assert_eq!(String::from_utf8(text).unwrap(), wanted);
    }
}
