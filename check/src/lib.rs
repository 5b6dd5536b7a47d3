//! Whether framestride's kernels are right, and how fast they are.
#![warn(missing_docs)]

pub mod device_tensors;
pub mod inputs;
pub mod layer_run;
mod memory;
pub mod reference;
pub mod repeatability;
pub mod timing;
pub mod tolerance;
pub mod verify;
