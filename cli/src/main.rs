//! The `framestride` command. Exit codes: 0 done, 1 a check failed or a kernel faulted, 2 bad
//! input.

fn main() -> std::process::ExitCode {
    framestride_cli::main()
}
