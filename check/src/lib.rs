//! Whether framestride's kernels are right, and how fast they are.
//!
//! ```
//! use framestride::{Device, Module, Spec};
//! use framestride_check::verify::{Effort, verify};
//!
//! # fn main() -> framestride::Result<()> {
//! let module = Module::load(&Device::emulator(), &Spec::shipped("tiny_plain")?)?;
//! let report = verify(&module, 1, Effort::default(), &|what, part| println!("{what} {part:.2}"))?;
//! assert!(report.ok, "{:?}", report.checks.failed().next());
//! # Ok(())
//! # }
//! ```
//!
//! What is compared, and with what:
//!
//! * [`reference`](mod@reference): the arithmetic of a layer in f64, straight from the rules.
//! * [`tolerance`]: how far a kernel's result may lie from it, derived from the kernel's
//!   arithmetic.
//! * [`compute_type`]: the types of numbers that the kernels multiply.
//! * [`tensors`], [`rope`]: the inputs of a layer on the host. [`Inputs`](tensors::Inputs) makes
//!   random inputs, and inputs that try the edges of the arithmetic.
//! * [`device_tensors`]: the same tensors on a device, in any arrangement.
//!
//! What is done with them:
//!
//! * [`verify`](mod@verify): each kernel against the reference, case by case. Its results are
//!   [`checks`].
//! * [`repeatability`]: whether a layer gives the same bytes however it is launched.
//! * [`layer_run`]: one layer on given inputs, compared with the reference.
//! * [`timing`]: how fast the kernels are.
#![warn(missing_docs)]

pub mod checks;
pub mod compute_type;
pub mod device_tensors;
mod inputs;
pub mod layer_run;
mod memory_fit;
pub mod random;
pub mod reference;
pub mod repeatability;
pub mod rope;
pub mod tensors;
pub mod timing;
pub mod tolerance;
pub mod verify;
