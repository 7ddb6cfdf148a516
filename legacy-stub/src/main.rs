//! The monolith as an executable of its own.

use clap::Parser;

/// A believable monolith, or one of the services extracted from it.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: legacy_stub::Options,
}

fn main() -> std::io::Result<()> {
    legacy_stub::main(&Arguments::parse().options)
}
