//! `tideover top`: the machines, as they are now and a second later.

use std::io;
use std::io::IsTerminal as _;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets;
use fdpass::Deadline;
use terminal::Raw;
use terminal::Signals;

use crate::cli;
use crate::machines;
use crate::page;
use crate::size;
use crate::table;
use crate::verbs;
use crate::verbs::Look;
use crate::verbs::Seen;
use crate::waterfall;

/// To a screen of its own, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// To the first place; erase what is left of the line; of the screen.
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_SCREEN: &str = "\x1b[J";
/// Keys that end it: q, and Ctrl-C, which is a key like any other in raw mode.
const QUITS: [u8; 2] = [b'q', 3];
/// What is added to the number of a signal that ends this.
const BY_SIGNAL: u8 = 128;
/// Rows of a terminal that does not say how many it has.
const ROWS: usize = 24;

const HEADER: [&str; 8] = ["name", "state", "memory", "vCPUs", "updates", "epoch", "last pause", "frozen"];

pub(crate) fn top(arguments: &cli::Top) -> anyhow::Result<ExitCode> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    if !arguments.once && stdin.is_terminal() && stdout.is_terminal() {
        return live(arguments.interval);
    }
    let seen = verbs::see()?;
    match arguments.json {
        true => verbs::say_json(&verbs::list(&seen)?)?,
        false if seen.is_empty() => verbs::say_none(),
        false => verbs::say(&format!("{}\n", shown(&seen)))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A screen of its own, until this is dropped.
struct Screen;

impl Screen {
    fn enter() -> anyhow::Result<Self> {
        verbs::say(ENTER)?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If nobody sees it, nothing is to be put right.
        let _ = write!(io::stdout(), "{LEAVE}").and_then(|()| io::stdout().flush());
    }
}

fn live(interval: Duration) -> anyhow::Result<ExitCode> {
    // Before anything is changed that they would leave so.
    let signals = Signals::hold().context("cannot hold signals back")?;
    let stdin = io::stdin();
    let _raw = Raw::enter(stdin.as_fd()).context("cannot put the terminal into raw mode")?;
    let _screen = Screen::enter()?;
    loop {
        let seen = verbs::see()?;
        let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout());
        let rows = size.ok().map(|size| usize::from(size.ws_row)).filter(|rows| *rows > 1).unwrap_or(ROWS);
        verbs::say(&screen(&shown(&seen).to_string(), waterfall::columns(), rows))?;
        io::stdout().flush()?;
        let ready = fdpass::ready(&[stdin.as_fd(), signals.as_fd()], Deadline::after(interval));
        for which in ready.context("cannot wait for a key")? {
            if which == 1 {
                // Taken, so that it does not end this before the terminal is as it was.
                let number = signals.take().and_then(|number| u8::try_from(number).ok());
                return Ok(ExitCode::from(BY_SIGNAL.saturating_add(number.unwrap_or_default())));
            }
            let mut keys = [0; 64];
            let read = rustix::io::read(stdin.as_fd(), &mut keys).unwrap_or_default();
            // Nothing: there is nobody at the terminal any more.
            if read == 0 || keys[..read].iter().any(|key| QUITS.contains(key)) {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}

/// The machines, in a table.
fn shown(seen: &[Seen]) -> Table {
    let mut shown = Table::new();
    shown.load_style(presets::UTF8_BORDERS_ONLY);
    shown.set_header(HEADER);
    for (name, look) in seen {
        shown.add_row(row(name, look));
    }
    for column in 2..7 {
        if let Some(column) = shown.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    shown
}

fn row(name: &str, look: &anyhow::Result<Look>) -> [String; 8] {
    let none = || "-".to_owned();
    let name = page::line(name);
    match look {
        Ok(Look::Status(status)) => [
            name,
            verbs::state(status.state).to_owned(),
            size::show(status.memory_bytes),
            status.vcpus.to_string(),
            status.updates.to_string(),
            status.epoch.map_or_else(none, |epoch| epoch.to_string()),
            status.last_pause_us.map_or_else(none, table::millis),
            if status.frozen { "yes" } else { "no" }.to_owned(),
        ],
        // Its memory has been frozen since before the kexec.
        Ok(Look::Held(_)) => {
            [name, "held".to_owned(), none(), none(), none(), none(), none(), "yes".to_owned()]
        }
        Err(error) => {
            [name, verbs::silence(error).to_owned(), none(), none(), none(), none(), none(), none()]
        }
    }
}

/// A table as a screen of so many columns and rows shows it.
fn screen(table: &str, columns: usize, rows: usize) -> String {
    let mut lines: Vec<&str> = table.lines().collect();
    let hidden = lines.len().saturating_sub(rows - 1);
    lines.truncate(rows - 1);
    let more = if hidden > 0 { format!("{hidden} lines more; ") } else { String::new() };
    let last = format!("{more}{}; q quits", machines::directory().display());
    let cut = |line: &str| line.chars().take(columns).collect::<String>();
    let body: String = lines.iter().map(|line| format!("{}{REST_OF_LINE}\n", cut(line))).collect();
    format!("{HOME}{body}{}{REST_OF_LINE}{REST_OF_SCREEN}", cut(&page::line(&last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_shows_no_more_than_it_has_room_for() {
        let table = "one\ntwo is long\nthree\n";
        let whole = screen(table, 80, 24);
        assert!(whole.starts_with("\x1b[Hone\x1b[K\ntwo is long\x1b[K\nthree\x1b[K\n"), "{whole:?}");
        assert!(whole.ends_with("q quits\x1b[K\x1b[J"), "{whole:?}");
        let small = screen(table, 5, 3);
        assert!(small.starts_with("\x1b[Hone\x1b[K\ntwo i\x1b[K\n1 lin\x1b[K"), "{small:?}");
        assert_eq!(small.matches('\n').count(), 2);
    }

    #[test]
    fn a_machine_that_does_not_answer_has_a_row_and_no_name_moves_the_cursor() {
        let seen = [("a\x1b[2Jb".to_owned(), Err(anyhow::anyhow!("no answer")))];
        let text = shown(&seen).to_string();
        assert!(text.contains("busy") && !text.contains('\x1b'), "{text}");
    }
}
