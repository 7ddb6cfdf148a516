//! The executable: allocator, arguments, exit codes.

use std::process::ExitCode;

/// Small short-lived objects on a few threads: measured faster than the system's allocator here.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    gateway::cli::main()
}
