//! The shape of a video diffusion transformer's attention, and all geometry derived from it.
//!
//! * [`layout`]: where each token of a head lies in the packed order, and which keys a query sees. `no_std`: the kernels
//!   compile this very code, and the host plans with it.
//! * [`launch`]: the parameter blocks that the host writes and the kernels read. `no_std`.
//! * `spec` (feature `std`): the TOML file, its validation, densities.
#![cfg_attr(not(feature = "std"), no_std)]
#![warn(missing_docs)]

pub mod launch;
pub mod layout;
