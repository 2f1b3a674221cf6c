//! `tideoverd`: keeps machines against the death of their VMMs.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tideoverd::main()
}
