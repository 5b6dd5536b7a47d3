//! A thin layer over the PTX that these kernels need.
//!
//! There is one short function for each instruction. It is named for what it does, and its module
//! says for whom: a `thread`, a `warp`. Section numbers are those of the PTX ISA, version 8.3.
//!
//! Functions are `unsafe`: the caller vouches for addresses, for the threads that take part, and
//! for the order of asynchronous operations. Each function says what that means for it.

pub mod barrier;
pub mod copy;
pub mod global;
pub mod math;
pub mod mma;
pub mod shared;
pub mod thread;
pub mod warp;
