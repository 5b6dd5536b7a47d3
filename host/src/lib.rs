//! Sparse attention for video diffusion transformers, on kernels made for the model's shape.
#![warn(missing_docs)]

pub mod attention;
pub mod device;
pub mod error;
pub mod files;
pub mod inputs;
pub mod launch;
pub mod masks;
pub mod module;
pub mod place;
pub mod reference;
pub mod report;
pub mod run;
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
