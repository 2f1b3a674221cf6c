//! The table of requirements, as `docs/requirements.md` has it.
//!
//! A requirement is a row of five cells whose first is a [`Number`]. All else in the page is prose.

use std::fmt;

/// The number of a requirement: its family, and two or three numbers with points between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Number {
    family: char,
    section: u32,
    number: u32,
    /// The third number, for those that have one.
    part: Option<u32>,
}

/// Letters that a number may begin with, in the order of their tables.
const FAMILIES: [char; 6] = ['R', 'O', 'L', 'H', 'G', 'P'];

impl Number {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let family = text.chars().next().filter(|first| FAMILIES.contains(first))?;
        let mut numbers = text[1..].split('.').map(|digits| {
            let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            is_plain.then(|| digits.parse::<u32>().ok()).flatten()
        });
        let (section, number) = (numbers.next()??, numbers.next()??);
        let part = match numbers.next() {
            Some(part) => Some(part?),
            None => None,
        };
        numbers.next().is_none().then_some(Self { family, section, number, part })
    }

    /// Every number in a line of text.
    pub(crate) fn all_in(line: &str) -> impl Iterator<Item = Self> + '_ {
        let words = line.split(|c: char| !c.is_alphanumeric() && c != '.' && c != '_' && c != '-');
        words.filter_map(|word| Self::parse(word.trim_matches('.')))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}.{}", self.family, self.section, self.number)?;
        self.part.map_or(Ok(()), |part| write!(f, ".{part}"))
    }
}

/// What we do about a requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    AsTheSeries,
    Better,
    NotApplicable,
    NotYet,
}

impl Answer {
    const WORDS: [(&str, Self); 4] = [
        ("as the series", Self::AsTheSeries),
        ("better", Self::Better),
        ("not applicable", Self::NotApplicable),
        ("not yet", Self::NotYet),
    ];

    /// Reads a cell: one of the words, and, but for the first, what stands behind its colon.
    fn parse(cell: &str) -> Option<Self> {
        let (word, why) = cell.split_once(':').unwrap_or((cell, ""));
        let (_, answer) = Self::WORDS.into_iter().find(|(of, _)| *of == word)?;
        (answer == Self::AsTheSeries || !why.trim().is_empty()).then_some(answer)
    }
}

/// One requirement.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// The line of the page.
    pub(crate) line: usize,
    pub(crate) number: Number,
    pub(crate) asked: String,
    pub(crate) answer: Answer,
    /// Paths from the root of the workspace.
    pub(crate) places: Vec<String>,
    /// Names of tests; none means that it is untested.
    pub(crate) tests: Vec<String>,
}

/// What is wrong with a line of the page.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) line: usize,
    pub(crate) what: String,
}

/// A cell that says that there is nothing to say.
const NOTHING: &str = "–";
const UNTESTED: &str = "untested";

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) rows: Vec<Row>,
    pub(crate) faults: Vec<Fault>,
}

impl Table {
    pub(crate) fn parse(page: &str) -> Self {
        let mut table = Self::default();
        for (line, text) in (1..).zip(page.lines()) {
            let Some(cells) = cells(text) else { continue };
            let Some(number) = cells.first().and_then(|cell| Number::parse(cell)) else {
                if !is_head(&cells) {
                    let what = format!("{:?} is no number of a requirement", cells[0]);
                    table.faults.push(Fault { line, what });
                }
                continue;
            };
            match row(line, number, &cells) {
                Ok(row) => table.rows.push(row),
                Err(what) => table.faults.push(Fault { line, what: format!("{number}: {what}") }),
            }
        }
        table.check_order();
        table
    }

    /// Numbers ascend within their family, so that none stands twice, and a reader finds one.
    fn check_order(&mut self) {
        for pair in self.rows.windows(2) {
            let [before, after] = [pair[0].number, pair[1].number];
            if before.family == after.family && before >= after {
                let what = format!("{after} stands behind {before}");
                self.faults.push(Fault { line: pair[1].line, what });
            }
        }
        for family in FAMILIES {
            let mut last = None;
            for (at, row) in self.rows.iter().enumerate().filter(|(_, row)| row.number.family == family) {
                if last.is_some_and(|last| last + 1 != at) {
                    let what = format!("{} stands apart from its family", row.number);
                    self.faults.push(Fault { line: row.line, what });
                }
                last = Some(at);
            }
        }
    }

    pub(crate) fn row(&self, number: Number) -> Option<&Row> {
        self.rows.iter().find(|row| row.number == number)
    }
}

/// The cells of a row of a table with five columns or a requirement's number; `None` for any other line.
fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.strip_prefix('|')?.strip_suffix('|').unwrap_or(&line[1..]);
    let cells: Vec<&str> = inner.split('|').map(str::trim).collect();
    (cells.len() == 5 || Number::parse(cells[0]).is_some()).then_some(cells)
}

/// The two lines above a table's first row.
fn is_head(cells: &[&str]) -> bool {
    cells[0] == "number" || cells.iter().all(|cell| cell.bytes().all(|byte| byte == b'-' || byte == b':'))
}

fn row(line: usize, number: Number, cells: &[&str]) -> Result<Row, String> {
    let [_, asked, answer, places, tests] = cells else {
        return Err(format!("{} cells, and not five", cells.len()));
    };
    if asked.is_empty() {
        return Err("it is not said what is asked".to_owned());
    }
    let answer = Answer::parse(answer).ok_or_else(|| {
        format!("{answer:?} is none of `as the series`, `better: ...`, `not applicable: ...`, `not yet: ...`")
    })?;
    let places = match *places {
        NOTHING => Vec::new(),
        places => quoted(places)?,
    };
    let tests = match *tests {
        NOTHING if answer == Answer::NotApplicable => Vec::new(),
        UNTESTED if answer != Answer::NotApplicable => Vec::new(),
        NOTHING | UNTESTED => {
            return Err(format!("tests are {NOTHING} if it is not applicable, and only then"));
        }
        tests => quoted(tests)?,
    };
    match answer {
        Answer::NotApplicable if !tests.is_empty() => {
            return Err("what is not applicable has no tests".to_owned());
        }
        Answer::NotYet if !tests.is_empty() => return Err("what is not there yet has no tests".to_owned()),
        Answer::AsTheSeries | Answer::Better if places.is_empty() => {
            return Err("it is not said where".to_owned());
        }
        _ => {}
    }
    Ok(Row { line, number, asked: (*asked).to_owned(), answer, places, tests })
}

/// Words in backquotes, with `<br>`, commas or blanks between them.
fn quoted(cell: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    for (at, piece) in cell.split('`').enumerate() {
        if at % 2 == 1 {
            words.push(piece.to_owned());
        } else if !matches!(piece.trim(), "" | "<br>" | ",") {
            return Err(format!("{piece:?} is not in backquotes"));
        }
    }
    if words.is_empty() || cell.matches('`').count() % 2 == 1 {
        return Err(format!("{cell:?} names nothing in backquotes"));
    }
    let mut once = words.clone();
    once.sort_unstable();
    once.dedup();
    if once.len() == words.len() { Ok(words) } else { Err("something is named twice".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Number {
        Number::parse(text).unwrap()
    }

    fn fault(row: &str) -> String {
        let table = Table::parse(row);
        assert_eq!((table.rows.len(), table.faults.len()), (0, 1), "{table:?}");
        table.faults.into_iter().next().unwrap().what
    }

    #[test]
    fn a_number_is_a_familys_letter_and_two_or_three_numbers() {
        for text in ["R0.1", "O1.14", "L2.5.7", "H3.6.2", "G5.3.4", "P6.5.1"] {
            assert_eq!(number(text).to_string(), text);
        }
        for text in
            ["", "R", "R1", "R1.", "R.1", "R1.2.3.4", "R1.x", "X1.2", "1.2", "r1.2", "R+1.2", "R1.2.", "é1.2"]
        {
            assert_eq!(Number::parse(text), None, "{text}");
        }
        assert!(number("R1.9") < number("R1.10") && number("L2.5.9") < number("L2.5.10"));
    }

    #[test]
    fn numbers_are_found_in_prose() {
        let found = |line| Number::all_in(line).map(|number| number.to_string()).collect::<Vec<_>>();
        assert_eq!(found("R2.4, O1.4."), ["R2.4", "O1.4"]);
        assert_eq!(found("as asked (objection O2.2; R3.2 to R3.8)"), ["O2.2", "R3.2", "R3.8"]);
        assert_eq!(found("XR1.2 R1.2-rc3 R1.2_x luo-R1.2 Linux 6.18"), [""; 0]);
    }

    #[test]
    fn a_row_says_what_is_asked_what_we_do_where_and_by_which_tests_it_is_shown() {
        let page = "# Title\n\n| number | asked | what we do | where | tests |\n|---|---|---|---|:--|\n\
            | R0.1 | a clause | as the series | `a/b.rs`, `c` | `p::x`<br>`p::y` |\n\
            | R0.2 | another | better: so | `a` | untested |\n\
            | R0.3 | a third | not applicable: why | – | – |\n\
            | R0.4 | a fourth | not yet: what | – | untested |\n\n| word | meaning |\n|--|--|\n| a | b |\n";
        let table = Table::parse(page);
        assert_eq!(table.faults, []);
        let row = &table.rows[0];
        assert_eq!((row.line, row.number, row.asked.as_str()), (5, number("R0.1"), "a clause"));
        assert_eq!(
            (&row.places[..], &row.tests[..]),
            (&["a/b.rs".into(), "c".into()][..], &["p::x".into(), "p::y".into()][..])
        );
        let answers: Vec<_> = table.rows.iter().map(|row| row.answer).collect();
        assert_eq!(answers, [Answer::AsTheSeries, Answer::Better, Answer::NotApplicable, Answer::NotYet]);
        assert_eq!(table.row(number("R0.3")).unwrap().line, 7);
        assert_eq!(table.row(number("R0.5")), None);
    }

    #[test]
    fn a_row_that_is_not_whole_is_a_fault_with_its_number() {
        assert!(fault("| R0.1 | a | as the series | `a` |").contains("4 cells"));
        assert!(fault("| R0.1 | a | as the series | `a` | `t` | more |").contains("6 cells"));
        assert!(fault("| R0.1 |  | as the series | `a` | `t` |").contains("what is asked"));
        assert!(fault("| R0.1 | a | as we like | `a` | `t` |").contains("R0.1: \"as we like\" is none of"));
        assert!(fault("| R0.1 | a | better | `a` | `t` |").contains("is none of"));
        assert!(fault("| R0.1 | a | not yet: | – | untested |").contains("is none of"));
        assert!(fault("| R0.1 | a | as the series | – | `t` |").contains("where"));
        assert!(fault("| R0.1 | a | as the series | a | `t` |").contains("backquotes"));
        assert!(fault("| R0.1 | a | as the series | `a` | `t` and `u` |").contains("backquotes"));
        assert!(fault("| R0.1 | a | as the series | `a` | `t |").contains("backquotes"));
        assert!(fault("| R0.1 | a | as the series | `a` |  |").contains("backquotes"));
        assert!(fault("| R0.1 | a | as the series | `a` | `t`<br>`t` |").contains("twice"));
        assert!(fault("| Q0.1 | a | as the series | `a` | `t` |").contains("\"Q0.1\" is no number"));
    }

    #[test]
    fn tests_are_named_where_there_is_something_to_test_and_nowhere_else() {
        assert!(fault("| R0.1 | a | as the series | `a` | – |").contains("only then"));
        assert!(fault("| R0.1 | a | not applicable: why | – | untested |").contains("only then"));
        assert!(fault("| R0.1 | a | not applicable: why | – | `t` |").contains("no tests"));
        assert!(fault("| R0.1 | a | not yet: what | `a` | `t` |").contains("no tests"));
    }

    #[test]
    fn numbers_ascend_and_none_stands_twice() {
        let row = |number: &str| format!("| {number} | a | as the series | `a` | `t` |\n");
        let faults = |numbers: &[&str]| {
            let page: String = numbers.iter().map(|number| row(number)).collect();
            Table::parse(&page).faults.into_iter().map(|fault| (fault.line, fault.what)).collect::<Vec<_>>()
        };
        assert_eq!(faults(&["R0.1", "R0.9", "R0.10", "R1.1", "O0.1", "L2.5.1", "L2.5.2"]), []);
        assert_eq!(faults(&["R0.1", "R0.1"]), [(2, "R0.1 stands behind R0.1".to_owned())]);
        assert_eq!(faults(&["R0.2", "R0.1"])[0].0, 2);
        assert_eq!(faults(&["R0.1", "O0.1", "R0.2"]), [(3, "R0.2 stands apart from its family".to_owned())]);
    }
}
