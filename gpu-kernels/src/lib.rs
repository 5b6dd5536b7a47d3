//! The kernels of framestride, in Rust, for NVIDIA GPUs.
//!
//! * [`cuda`]: a thin layer over PTX.
//! * [`model`]: what `attention_kernels!` states of a spec.
//! * [`pack`](mod@pack): norm, RoPE and reordering into packed images.
//! * [`profile`]: attention of sampled rows under every mask, by which heads are classified.
//! * [`attention`]: the sparse attention itself.
//! * [`judge`]: which heads 8 bits are enough for.
//! * [`softmax`] and the generated [`cuda::mma::TileProducts`]: what `profile` and `attention`
//!   share.
//! * [`masks`]: what a head sees.
//! * [`ring`]: how tiles come to shared memory where there is no copy engine.
//!
//! All of it is there only when it is compiled for `nvptx64-nvidia-cuda`. Elsewhere the crate has
//! only `SOURCES`, which tells the builder where the sources lie.
#![cfg_attr(target_arch = "nvptx64", no_std, feature(asm_experimental_arch))]
#![warn(missing_docs)]
// Every function that touches the device is unsafe as a whole, and its documentation has its
// contract.
#![allow(unsafe_op_in_unsafe_fn)]

#[cfg(target_arch = "nvptx64")]
pub mod attention;
#[cfg(target_arch = "nvptx64")]
pub mod cuda;
#[cfg(target_arch = "nvptx64")]
pub mod element;
#[cfg(target_arch = "nvptx64")]
pub mod judge;
#[cfg(target_arch = "nvptx64")]
pub mod masks;
#[cfg(target_arch = "nvptx64")]
pub mod model;
#[cfg(target_arch = "nvptx64")]
pub mod pack;
#[cfg(target_arch = "nvptx64")]
pub mod profile;
#[cfg(target_arch = "nvptx64")]
pub mod ring;
#[cfg(target_arch = "nvptx64")]
pub mod select;
#[cfg(target_arch = "nvptx64")]
pub mod softmax;
#[cfg(target_arch = "nvptx64")]
#[doc(hidden)]
pub use framestride_macros as macros;
pub use framestride_macros::kernel;
pub use framestride_shapes as shapes;

/// [`macros::attention_kernels!`]. It is given the path of this crate, because its user may have
/// given the crate another name.
#[macro_export]
macro_rules! attention_kernels {
    ($($shape:tt)*) => { $crate::macros::attention_kernels! { $crate; $($shape)* } };
}

/// A literal of a template, u32: the name stands where PTX has a literal, until a number is filled
/// in. The builder leaves this instruction to LLVM as arithmetic, which may move and merge it.
#[doc(hidden)]
#[macro_export]
macro_rules! literal {
    ($name:literal) => {{
        let value: u32;
        // SAFETY: the instruction sets a register.
        unsafe {
            ::core::arch::asm!(
                ::core::concat!("mov.u32 {}, ", $name, ";"),
                out(reg32) value,
                options(pure, nomem, nostack)
            )
        };
        value
    }};
}

/// [`macros::tile_products!`], likewise.
#[macro_export]
macro_rules! tile_products {
    ($($tile:tt)*) => { $crate::macros::tile_products! { $crate; $($tile)* } };
}

/// [`macros::warp_products!`], likewise.
#[macro_export]
macro_rules! warp_products {
    ($($tile:tt)*) => { $crate::macros::warp_products! { $crate; $($tile)* } };
}

/// Folders of the packages that kernels are compiled from: this one, the macros and the shapes.
/// They lay there when this was compiled. cargo keeps packages beside each other or apart,
/// depending on whether they come from a checkout, a registry or a vendor's folder.
#[cfg(not(target_arch = "nvptx64"))]
pub const SOURCES: [(&str, &str); 3] = [
    ("gpu-kernels", env!("CARGO_MANIFEST_DIR")),
    ("codegen-macros", framestride_macros::folder!()),
    ("shapes", framestride_shapes::FOLDER),
];

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // This aborts at once. With `immediate-abort` there is nothing to say, and no path of these
    // kernels leads here.
    //
    // SAFETY: the instruction ends the kernel.
    unsafe { core::arch::asm!("trap;", options(noreturn)) }
}
