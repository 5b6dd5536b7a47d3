//! Runs dot products that tell one arithmetic of `mma.sync` from another on any GPU since Ampere,
//! and compares the emulator with what the GPU computed. [`probe`] has the commands.
//!
//! The emulator adds as Hopper's `wgmma` was found to. Where `compare` finds no difference,
//! `mma.sync` of that GPU does the same.

mod probe;

use probe::Probe;
use probe::tensor_core::{Format, mma_sync_cases, mma_sync_program};
use std::process::ExitCode;

fn main() -> ExitCode {
    let formats = [Format::Bf16, Format::F16];
    probe::main(&Probe {
        name: "mma_probe",
        gpus: "an NVIDIA GPU since Ampere",
        program: mma_sync_program(&formats),
        cases: formats.into_iter().flat_map(mma_sync_cases).collect(),
    })
}
