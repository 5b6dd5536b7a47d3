//! A thin layer over the PTX that these kernels need: one short function per instruction, named for what it does, with scope as
//! namespace (`warp::`, `warpgroup::`, `block::`). Section numbers are those of the PTX ISA, version 8.3.
//!
//! Everything is `unsafe`: the caller vouches for addresses, for the threads that take part, and for the order of asynchronous
//! operations. Each function says what that means for it.

pub mod barrier;
pub mod copy;
pub mod global;
pub mod math;
pub mod mma;
pub mod shared;
pub mod thread;
pub mod warp;
