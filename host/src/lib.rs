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
//!
//! * [`attention`]: one layer, and what it checks before it launches anything.
//! * [`module`]: kernels, shipped or built, on a device. [`device`]: a GPU through the CUDA driver, or the emulator.
//! * [`reference`](mod@reference), [`tolerance`], [`verify`]: the layer in f64, how far a kernel may lie from it, and whether it does.
//!   [`steady`]: whether a layer gives the same bytes however it is launched.
//! * [`bench`](mod@bench): how fast the kernels are.
//! * [`inputs`], [`files`], [`output`], [`video`], [`place`], [`run`](mod@run), [`masks`], [`report`]: what the `framestride` command is made of.
#![warn(missing_docs)]

pub mod attention;
pub mod bench;
pub mod device;
pub mod error;
pub mod files;
pub mod inputs;
pub mod launch;
pub mod masks;
mod memory;
pub mod module;
pub mod output;
pub mod place;
pub mod reference;
pub mod report;
pub mod run;
pub mod steady;
pub mod tolerance;
pub mod verify;
pub mod video;

pub use attention::{HeadProfile, HeadTypes, Layer, SparseAttention, Workspace};
pub use device::{Device, Stream};
pub use error::{Error, Result};
pub use framestride_shapes as shapes;
pub use module::{Kernels, Module};

use framestride_shapes::layout::HeadType;

/// Name of a head type as the command prints it.
pub const fn name_of(head: HeadType) -> &'static str {
    match head {
        HeadType::Dense => "dense",
        HeadType::Spatial => "spatial",
        HeadType::Temporal => "temporal",
    }
}
