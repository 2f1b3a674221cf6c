//! What follows what, and how long each takes: a line for each part, with a bar that begins where the one before it ends.

use crate::page;
use crate::table::millis;

/// The width of a terminal that does not tell its own, and of what is none.
const WIDTH: usize = 80;
/// Wider lines are hard to follow.
const WIDEST: usize = 140;
/// What stands left of the bars.
const LEFT: usize = 2 + 18 + 1 + 14 + 2;
/// Parts of a cell: from the left, so many eighths of it.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// What took how long, one after the other.
#[derive(Debug)]
pub(crate) struct Waterfall {
    parts: Vec<(String, f64)>,
}

impl Waterfall {
    /// Of these parts, in their order, in microseconds.
    pub(crate) fn of(parts: impl IntoIterator<Item = (String, f64)>) -> Self {
        let sound = |(name, us): (String, f64)| (name, if us.is_finite() { us.max(0.0) } else { 0.0 });
        Self { parts: parts.into_iter().map(sound).collect() }
    }

    /// Each part with where it begins, as shares of the whole.
    fn shares(&self) -> impl Iterator<Item = (&str, f64, f64, f64)> {
        let all: f64 = self.parts.iter().map(|(_, us)| us).sum();
        let share = move |us: f64| if all > 0.0 { us / all } else { 0.0 };
        self.parts.iter().scan(0.0, move |before, (name, us)| {
            let from = share(*before);
            *before += us;
            Some((name.as_str(), *us, from, share(*before)))
        })
    }

    /// For a terminal of so many columns.
    pub(crate) fn text(&self, width: usize) -> String {
        let cells = width.clamp(LEFT + 10, WIDEST) - LEFT;
        let line = |(name, us, from, to): (&str, f64, f64, f64)| {
            let name = page::line(&name.replace('_', " "));
            format!("  {name:<18} {:>14}  {}\n", millis(us), bar(cells, from, to))
        };
        self.shares().map(line).collect()
    }

    /// Rows of a table: name, time, bar.
    pub(crate) fn html(&self) -> String {
        let row = |(name, us, from, to): (&str, f64, f64, f64)| {
            let (x, width) = (from * 1000.0, ((to - from) * 1000.0).max(1.0));
            format!(
                "<tr><th scope=row>{}<td class=n>{}<td class=bar><svg viewBox=\"0 0 1000 10\" preserveAspectRatio=none \
                 aria-hidden=true><rect x=\"{:.1}\" width=\"{width:.1}\" height=10 /></svg>\n",
                page::escape(&name.replace('_', " ")),
                millis(us),
                x.min(1000.0 - width),
            )
        };
        self.shares().map(row).collect()
    }
}

/// A bar in so many cells, from one share of them to another; always something.
fn bar(cells: usize, from: f64, to: f64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a terminal has few columns")]
    let eighths = (cells * 8) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shares are from 0 to 1")]
    let at = |share: f64| (share.clamp(0.0, 1.0) * eighths).round() as usize;
    // A cell can be filled from its left only: so a bar begins at one.
    let start = (at(from) / 8).min(cells - 1);
    let len = at(to).saturating_sub(start * 8).clamp(1, (cells - start) * 8);
    " ".repeat(start) + &"█".repeat(len / 8) + EIGHTHS[len % 8]
}

/// How many columns standard output has.
pub(crate) fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).unwrap_or(WIDTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(parts: &[(&str, f64)]) -> Waterfall {
        Waterfall::of(parts.iter().map(|(name, us)| ((*name).to_owned(), *us)))
    }

    #[test]
    fn a_bar_begins_where_the_one_before_it_ends() {
        let text = of(&[("save", 1000.0), ("user_space", 2000.0), ("load", 1000.0)]).text(LEFT + 16);
        let wanted = "  save                      1.00 ms  ████
  user space                2.00 ms      ████████
  load                      1.00 ms              ████
";
        assert_eq!(text, wanted);
    }

    #[test]
    fn the_least_part_has_a_bar_and_none_leaves_the_terminal() {
        for width in [0, 40, 80, 1000] {
            let parts = [("a", 0.0), ("b", 1e9), ("c", 0.001), ("d", f64::NAN), ("e", -5.0)];
            let text = of(&parts).text(width);
            assert_eq!(text.lines().count(), parts.len());
            for line in text.lines() {
                let (columns, bar) = (line.chars().count(), line.chars().last().unwrap());
                assert!(columns <= width.clamp(LEFT + 10, WIDEST), "{columns} of {width}: {line}");
                assert!(bar > '▀', "{line}");
            }
        }
        assert_eq!(of(&[("a", 0.0)]).text(80).lines().count(), 1);
        assert_eq!(of(&[]).text(80), "");
    }

    #[test]
    fn names_are_escaped_where_they_are_shown() {
        let hostile = of(&[("<script>\u{1b}[2J", 1.0)]);
        assert!(!hostile.text(80).contains('\u{1b}') && !hostile.html().contains("<script>"));
    }
}
