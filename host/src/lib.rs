//! Sparse attention for video diffusion transformers, on GPU kernels made for the model's shape. Any
//! shape is a spec, and loading one takes seconds at most and needs no compiler but the driver's.
//!
//! One layer takes Q, K and V as a model's projections leave them. It normalises and rotates them,
//! and finds out whether each head looks along space or along time. Then it computes attention with
//! the mask of that kind.
//!
//! ```no_run
//! use framestride::{Device, Module, Spec, Stream, Workspace};
//! use framestride::{HeadTypes, Layer, SparseAttention, Text};
//!
//! # fn main() -> framestride::Result<()> {
//! # let (q, k, v, out, cos, sin) = Default::default();
//! // Once. The driver compiles the kernels when they are loaded.
//! let device = Device::gpu(0)?;
//! let module = Module::load(&device, &Spec::shipped("hunyuan_video_720p")?)?;
//! let attention = SparseAttention::new(&module, 1, 24)?; // batch, heads
//! let workspace = Workspace::allocate(&device, attention.workspace_bytes())?;
//!
//! // For each step and layer. Q, K, V and the output are device addresses with strides.
//! # let (step, layer_index) = (0, 0);
//! let layer = Layer { q, k, v, out, cos, sin, ..Layer::default() };
//! let types: HeadTypes = attention.head_types(step, layer_index); // dense in the warm-up
//! // SAFETY: the addresses are memory of this GPU, which lives until the work is done.
//! unsafe { attention.forward(Stream::DEFAULT, &layer, types, &workspace)? };
//!
//! // If you want to know which heads looked where. This waits for the GPU.
//! let found = attention.read_profile(&workspace)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What an engine can rely on
//!
//! * **Everything is checked before the first launch.** An error says what was found, what is
//!   allowed and how to mend it. Then nothing was launched.
//! * **A launch does nothing else.** It allocates nothing, copies nothing and waits for nothing. So a
//!   layer can be captured in a CUDA graph.
//! * **Contexts, streams and memory can be yours**: [`device::Gpu::borrow`], [`Stream::from_raw`]
//!   and [`Workspace::borrow`]. What is borrowed is never destroyed or freed.
//! * **A launch may have any batch and any number of heads**. Only a QK-norm over all heads needs
//!   exactly the spec's.
//!
//! `examples/` shows each: one layer, a spec made in code with norm, RoPE and text, a borrowed context
//! and stream, a CUDA graph.
//!
//! # Where what is
//!
//! * [`SparseAttention`], [`Layer`], [`HeadTypes`], [`Workspace`]: one layer, and the memory it
//!   needs.
//! * [`Kernels`], [`Module`]: kernels that were filled in for a spec or read from files, and loaded.
//! * [`device`]: GPUs through the CUDA driver, and the emulator.
//! * [`launch`]: what one layer launches, for those who want to time or place the launches
//!   themselves.
//! * [`shapes`]: the spec of a model's attention, and all geometry that follows from it.
//!
//! # Features
//!
//! All are on by default. Without them this crate loads kernels from files and runs them on a GPU.
//!
//! * `templates`: kernels of any spec are made of embedded templates.
//! * `emulator`: a device without a GPU. It runs the kernels on the CPU, slowly, and reports what a
//!   GPU forgives.
#![warn(missing_docs)]

#[doc(hidden)]
pub mod call;
mod describe;
pub mod device;
mod error;
pub mod launch;
mod layer;
mod module;
mod plan;
#[cfg(feature = "templates")]
mod template;
mod workspace;

pub use describe::{Description, MaskDescription};
pub use device::{Device, Stream};
pub use error::{Error, Result};
#[doc(inline)]
pub use framestride_shapes as shapes;
pub use framestride_shapes::spec::Spec;
pub use layer::{Found, HeadPrecision, HeadProfile, HeadTypes, Layer, SparseAttention, Text};
pub use module::{Kernels, Loading, Module};
pub use plan::workspace_layout;
pub use workspace::Workspace;
