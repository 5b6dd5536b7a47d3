//! Sparse attention for video diffusion transformers, on kernels made for the model's shape.
//!
//! ```no_run
//! use framestride::{Device, HeadTypes, Kernels, Layer, Module, SparseAttention, Stream, Workspace};
//!
//! # fn main() -> framestride::Result<()> {
//! # let (q, k, v, out, cos, sin) = Default::default();
//! let device = Device::gpu(0)?; // or the emulator, or a borrowed context: Gpu::borrow
//! let module = Module::load(&device, &Kernels::shipped("hunyuan_video_720p")?)?; // the driver compiles the PTX here
//! let attention = SparseAttention::new(&module, 1, 24)?; // batch, heads
//! let workspace = Workspace::allocate(&device, attention.workspace_bytes())?; // or Workspace::borrow
//! # let (step, layer_index) = (0, 0);
//! // For each step and layer; q, k, v and out are device addresses and strides, nothing is copied or waited for:
//! let layer = Layer { q, k, v, out, cos, sin, ..Layer::default() };
//! let types: HeadTypes = attention.head_types(step, layer_index); // dense during the schedule's warm-up
//! unsafe { attention.forward(Stream::DEFAULT, &layer, types, &workspace)? };
//! let found = attention.read_profile(&workspace)?; // if you want to know: waits
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

pub mod call;
pub mod device;
mod error;
pub mod launch;
mod layer;
mod module;
mod plan;
mod workspace;

pub use device::{Device, Stream};
pub use error::{Error, Result};
pub use framestride_shapes as shapes;
pub use layer::{HeadProfile, HeadTypes, Layer, SparseAttention};
pub use module::{Kernels, Module};
pub use plan::profile_splits;
pub use workspace::Workspace;
