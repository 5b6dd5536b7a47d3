//! The kernels of framestride, in Rust, for NVIDIA GPUs.
//!
//! * [`cuda`]: a thin layer over PTX.
//! * [`pack`](mod@pack): norm, RoPE and reordering into packed images.
//! * [`profile`]: attention of sampled rows under every mask, and the choice of each head's mask.
//! * [`attention`]: the sparse attention itself, on [`softmax`] and the generated [`cuda::mma::TileProducts`].
//! * [`shape`]: what `attention_kernels!` states of a spec.
//!
//! The crate is empty unless it is compiled for `nvptx64-nvidia-cuda`.
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg(target_arch = "nvptx64")]
#![feature(asm_experimental_arch, stmt_expr_attributes)]
#![warn(missing_docs)]
// Every function that touches the device is unsafe as a whole; its contract is in its documentation.
#![allow(unsafe_op_in_unsafe_fn)]

pub mod attention;
pub mod cuda;
pub mod element;
pub mod pack;
pub mod profile;
pub mod shape;
pub mod softmax;

#[doc(hidden)]
pub use framestride_macros as macros;
pub use framestride_macros::kernel;
pub use framestride_shapes as shapes;

/// [`macros::attention_kernels!`], which this crate's path is given to: its user may have given the crate another name.
#[macro_export]
macro_rules! attention_kernels {
    ($($shape:tt)*) => { $crate::macros::attention_kernels! { $crate; $($shape)* } };
}

/// [`macros::tile_products!`], likewise.
#[macro_export]
macro_rules! tile_products {
    ($($tile:tt)*) => { $crate::macros::tile_products! { $crate; $($tile)* } };
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Aborts at once: `immediate-abort` leaves nothing to say, and no path of these kernels leads here.
    // SAFETY: ends the kernel.
    unsafe { core::arch::asm!("trap;", options(noreturn)) }
}
