//! Runs dot products that tell one arithmetic of `wgmma` from another on a Hopper GPU, and compares
//! the emulator with what the GPU computed. [`probe`] has the commands.

mod probe;

use probe::Probe;
use probe::tensor_core::{Format, cases, program};
use std::process::ExitCode;

fn main() -> ExitCode {
    probe::main(&Probe {
        name: "wgmma_probe",
        gpus: "an NVIDIA Hopper GPU",
        program: program(&Format::ALL),
        cases: Format::ALL.into_iter().flat_map(cases).collect(),
    })
}
