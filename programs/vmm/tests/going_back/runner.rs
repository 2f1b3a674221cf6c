//! Runs tests and tells of them as the standard test runner does, which `cargo xtask test` reads.

use std::io::Write as _;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

/// A test and its name.
pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) run: fn(),
}

/// What the command line asks for; of the standard runner's arguments, those that choose tests.
#[derive(Debug, Default)]
struct Choice {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    threads: Option<usize>,
    /// Only tests that are ignored, and there are none.
    none: bool,
}

impl Choice {
    fn of(arguments: impl IntoIterator<Item = String>) -> Self {
        let mut choice = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument, None),
            };
            let mut value = || value.clone().or_else(|| arguments.next()).unwrap_or_default();
            match name.as_str() {
                "--exact" => choice.exact = true,
                "--list" => choice.list = true,
                "--ignored" => choice.none = true,
                "--skip" => choice.skip.push(value()),
                "--test-threads" => choice.threads = value().parse().ok(),
                "--format" | "--color" | "--logfile" => drop(value()),
                name if name.starts_with('-') => {}
                _ => choice.filters.push(name),
            }
        }
        choice
    }

    fn takes(&self, test: &Test) -> bool {
        let fits = |word: &String| if self.exact { test.name == *word } else { test.name.contains(word) };
        let wanted = self.filters.is_empty() || self.filters.iter().any(fits);
        wanted && !self.none && !self.skip.iter().any(fits)
    }

    fn threads(&self) -> usize {
        let told = || std::env::var("RUST_TEST_THREADS").ok()?.parse().ok();
        let processors = || thread::available_parallelism().map_or(1, usize::from);
        self.threads.or_else(told).unwrap_or_else(processors).max(1)
    }
}

/// Runs those of `tests` that `arguments` choose. True if none failed.
pub(crate) fn run(tests: Vec<Test>, arguments: impl IntoIterator<Item = String>) -> bool {
    let choice = Choice::of(arguments);
    let (chosen, left): (Vec<Test>, Vec<Test>) = tests.into_iter().partition(|test| choice.takes(test));
    if choice.list {
        chosen.iter().for_each(|test| say(&format!("{}: test", test.name)));
        return true;
    }
    say(&format!("\nrunning {} test{}", chosen.len(), if chosen.len() == 1 { "" } else { "s" }));
    let begun = Instant::now();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..choice.threads().min(chosen.len()) {
            scope.spawn(|| {
                while let Some(test) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let passed = passes(test);
                    say(&format!("test {} ... {}", test.name, if passed { "ok" } else { "FAILED" }));
                    if !passed {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).push(test.name.clone());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !failed.is_empty() {
        say("\nfailures:");
        failed.iter().for_each(|name| say(&format!("    {name}")));
    }
    say(&format!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if failed.is_empty() { "ok" } else { "FAILED" },
        chosen.len() - failed.len(),
        failed.len(),
        left.len(),
        begun.elapsed().as_secs_f64(),
    ));
    failed.is_empty()
}

/// Each in a thread that bears its name, so that a panic tells whose it is.
fn passes(test: &Test) -> bool {
    let thread = thread::Builder::new().name(test.name.clone()).spawn(test.run);
    thread.is_ok_and(|thread| thread.join().is_ok())
}

/// One line, whole, whoever else prints.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush());
}
