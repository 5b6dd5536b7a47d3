#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

mod attention;
mod call;
mod place;

pub use attention::{Attention, HeadTypes, Norm, Output, Rope, Text};
pub use framestride::{Spec, shapes};
