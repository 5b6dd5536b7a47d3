//! The shape of a video diffusion transformer's attention, and all geometry derived from it.
//!
//! * [`arch`]: the families of GPUs that kernels exist for. `no_std`.
//! * [`layout`]: where each token of a head lies in the packed order, and which keys a query sees.
//!   `no_std`: the kernels compile this very code, and the host plans with it.
//! * [`dtype`], [`image`]: the elements, and where each byte of a packed image lies. `no_std`.
//! * [`norm_rope`]: QK-norm and RoPE. `no_std`.
//! * [`numbers`]: the numbers of a spec that kernels know, which loading fills in. `no_std`.
//! * [`params`]: the parameter blocks that the host writes and the kernels read. `no_std`.
//! * [`blocks`], [`shared`]: how the kernels' blocks are made, and what lies where in their shared
//!   memory. `no_std`.
//! * [`fragment`]: which element of a tensor-core tile a register holds. `no_std`.
//! * [`spec`] (feature `std`): the TOML file, explained key by key, and its validation.
//! * [`density`] (feature `std`): exact counts of visible pairs, and the half width that gives a
//!   density.
//! * [`tiling`] (feature `std`): which tiles the attention kernel visits.
//! * [`estimate`] (feature `std`): how long a layer takes, and what profiling gains.
//! * [`workspace`] (feature `std`): where everything lies in the one allocation of a layer.
//! * [`text`] (feature `std`): messages that a terminal can show, and names that were meant.
//! * [`manifest`] (feature `serde`): what stands beside a PTX file, for whoever launches it.
#![cfg_attr(not(feature = "std"), no_std)]
#![warn(missing_docs)]

pub mod arch;
pub mod blocks;
#[cfg(feature = "std")]
pub mod density;
pub mod dtype;
#[cfg(feature = "std")]
pub mod estimate;
pub mod fragment;
pub mod image;
pub mod layout;
#[cfg(feature = "serde")]
pub mod manifest;
pub mod norm_rope;
pub mod numbers;
pub mod params;
pub mod shared;
#[cfg(feature = "std")]
pub mod spec;
#[cfg(feature = "std")]
pub mod text;
#[cfg(feature = "std")]
pub mod tiling;
#[cfg(feature = "std")]
pub mod workspace;

/// Folder of this package, as it lay when this was compiled.
#[cfg(feature = "std")]
pub const FOLDER: &str = env!("CARGO_MANIFEST_DIR");

/// The shipped specs: name and TOML text, in the order of their names. They are the files of
/// `shapes/models`.
#[cfg(feature = "std")]
pub const fn models() -> &'static [(&'static str, &'static str)] {
    /// Names a model once for both.
    macro_rules! models {
        ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../models/", $name, ".toml")))),*] };
    }
    models![
        "cogvideox_1_5_5b_768x1360",
        "cogvideox_5b_480x720",
        "cosmos_1_14b_704x1280",
        "cosmos_predict_2_5_14b_704x1280",
        "cosmos_predict_2_5_2b_704x1280",
        "demo",
        "hunyuan_custom_720p",
        "hunyuan_video_1_5_720p",
        "hunyuan_video_544x960",
        "hunyuan_video_720p",
        "kandinsky_5_lite_512x768",
        "kandinsky_5_pro_768x1280",
        "longcat_video_480x832",
        "ltx_2_1088x1920",
        "ltx_2_512x768",
        "ltx_2_5_1088x1920",
        "ltx_2_5_2176x3840",
        "ltx_video_512x704",
        "minimax_h3_10s_768x1344",
        "minimax_h3_14s_768x1344",
        "minimax_h3_15s_768x1344",
        "minimax_h3_5s_768x1344",
        "mochi_1_480x848",
        "motif_video_2b_736x1280",
        "tiny_e4m3",
        "tiny_heads_sinks",
        "tiny_layer_half",
        "tiny_plain",
        "tiny_text_last",
        "tiny_text_rope",
        "wan_14b_720p",
        "wan_2_1_1_3b_480p",
        "wan_2_2_ti2v_5b_704x1280",
        "wan_vace_14b_720p",
    ]
}
