//! `tideoverd`: keeps machines against the death of their VMMs.

fn main() -> std::process::ExitCode {
    tideoverd::main()
}
