//! What a profiled layer can gain over a dense one: an estimate for an H200, from rates that were measured on one.
//!
//! A dense layer is pack and attention. A profiled one skips tiles of the attention, and in return profiles its heads and packs those
//! that come out temporal a second time: half of them, it is assumed here. Whether that pays depends on density and tokens. The
//! rates are those of BENCHMARKS.md at the root of the repository, whose layers this comes within 15% of.

use crate::layout::{HeadType, Layout};
use crate::spec::Spec;
use crate::tiling::count_tiles;

/// Multiprocessors of an H200 (and of an H100 SXM).
pub const MULTIPROCESSORS: u32 = 132;

/// Gain below which a shape is said to have none.
pub const LEAST_GAIN: f64 = 1.05;

/// Bytes a millisecond that packing and profiling move. BENCHMARKS.md has 3.4 to 3.8 TB/s for all heads, 2.4 to 3.5 for some of them.
const MEMORY: f64 = 3.4e9;

/// Milliseconds from one launch of a layer to the next, which short kernels do not hide.
const LAUNCH: f64 = 5e-3;

/// Operations a millisecond in full tiles of attention on all multiprocessors, and time of an edge tile over a full one's.
///
/// From the dense and sparse rows of BENCHMARKS.md, with every pair of a visited tile counted: 702 to 759 TFLOP/s at head dim 128,
/// edges or not; at 64 dense 619 and 634, of which LTX's sparse heads, with 22% of their tiles edges, keep 88%. Of heads whose softmax needs
/// no offsets.
const fn attention_rate(head_dim: u32) -> (f64, f64) {
    if head_dim == 64 { (625e9, 1.6) } else { (735e9, 1.0) }
}

/// Expected milliseconds of the parts of a layer, all text valid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gain {
    /// Attention with every head dense.
    pub dense_attention: f64,
    /// Attention with half of the heads spatial, half temporal.
    pub sparse_attention: f64,
    /// Norm, RoPE and reordering of all heads.
    pub pack: f64,
    /// Profiling: all sampled rows by all keys.
    pub profile: f64,
    /// Packing again, half of the heads.
    pub repack: f64,
    /// Attention likewise, were both half widths one token.
    pub narrowest_attention: f64,
}

/// Why a shape gains nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The masks leave too much: smaller half widths would gain.
    Density,
    /// Attention is too short for what profiling costs: no half width would gain.
    Tokens,
}

impl Gain {
    /// The estimate for a spec.
    pub fn estimate(spec: &Spec) -> Gain {
        let heads = f64::from(spec.heads) * f64::from(spec.batch);
        let row = heads * f64::from(spec.head_dim);
        let tensor = 2.0 * f64::from(spec.layout.sequence()) * row;
        let (flop, edge) = attention_rate(spec.head_dim);
        let tiles = spec.tiles();
        let tile_flop = 4.0 * f64::from(tiles.query_rows) * f64::from(tiles.key_rows) * row;
        let attention = |layout: &Layout, head| {
            let counts = count_tiles(layout, head, tiles, layout.text_tokens);
            let work = (counts.full as f64 + edge * counts.edge as f64) * tile_flop;
            // A query tile is one multiprocessor's: with fewer of those than of these, some have nothing to do.
            let busy = (counts.query_tiles as f64 * heads / f64::from(MULTIPROCESSORS)).min(1.0);
            LAUNCH + work / (flop * busy)
        };
        let half_each =
            |layout: &Layout| (attention(layout, HeadType::Spatial) + attention(layout, HeadType::Temporal)) / 2.0;
        // One product with Q, and one with V for each of the three masks, of 2 operations a multiply-add.
        let profile_flop = 8.0 * f64::from(spec.profile.rows) * f64::from(spec.layout.sequence()) * row;
        Gain {
            dense_attention: attention(&spec.layout, HeadType::Dense),
            sparse_attention: half_each(&spec.layout),
            narrowest_attention: half_each(&Layout { spatial_half_width: 1, temporal_half_width: 1, ..spec.layout }),
            // Three tensors read, three written.
            pack: LAUNCH + 6.0 * tensor / MEMORY,
            // Two kernels. K and V are read once, and the products hide little of that.
            profile: 2.0 * LAUNCH + 2.0 * tensor / MEMORY + profile_flop / flop,
            repack: LAUNCH + 3.0 * tensor / MEMORY,
        }
    }

    /// A layer with every head dense.
    pub fn dense_layer(&self) -> f64 {
        self.pack + self.dense_attention
    }

    /// A layer whose heads are profiled.
    pub fn layer(&self) -> f64 {
        self.pack + self.profile + self.repack + self.sparse_attention
    }

    /// Time of the dense layer over the profiled one's.
    pub fn over_dense(&self) -> f64 {
        self.dense_layer() / self.layer()
    }

    /// What sparse attention may take for a gain of [`LEAST_GAIN`]; negative when it never gains as much.
    pub fn affordable_attention(&self) -> f64 {
        self.dense_layer() / LEAST_GAIN - self.pack - self.profile - self.repack
    }

    /// Why the shape gains less than [`LEAST_GAIN`], if it does.
    pub fn obstacle(&self) -> Option<Obstacle> {
        let affordable = self.affordable_attention();
        if self.sparse_attention <= affordable {
            None
        } else if self.narrowest_attention <= affordable {
            Some(Obstacle::Density)
        } else {
            Some(Obstacle::Tokens)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Gain, LEAST_GAIN, Obstacle};
    use crate::models;
    use crate::spec::Spec;

    fn estimate(text: &str) -> Gain {
        Gain::estimate(&Spec::parse("test", text).unwrap_or_else(|error| panic!("{error}")))
    }

    fn shipped(name: &str) -> &'static str {
        models().iter().find(|(model, _)| *model == name).map_or("", |(_, text)| text)
    }

    /// Milliseconds of dense attention, pack and profiled layer in BENCHMARKS.md, of so many batch items.
    #[test]
    fn comes_near_what_was_measured() {
        for (name, batch, dense, pack, layer) in [
            ("hunyuan_video_720p", 1, 232.538, 1.174, 62.639),
            ("wan_14b_720p", 2, 312.762, 2.511, 88.596),
            ("cogvideox_1_5_5b_768x1360", 2, 79.015, 0.887, 22.264),
            ("ltx_video_512x704", 2, 1.472, 0.122, 0.765),
            ("wan_2_1_1_3b_480p", 2, 17.457, 0.331, 5.148),
        ] {
            let gain = estimate(&shipped(name).replace("batch = 1", &format!("batch = {batch}")));
            for (what, estimated, measured) in [
                ("dense", gain.dense_layer(), dense + pack),
                ("profiled", gain.layer(), layer),
                ("gain", gain.over_dense(), (dense + pack) / layer),
            ] {
                assert!((estimated / measured - 1.0).abs() < 0.15, "{name}, {what}: {estimated} for {measured}");
            }
        }
    }

    #[test]
    fn models_gain() {
        for (name, text) in models().iter().filter(|(name, _)| !name.starts_with("tiny") && *name != "demo") {
            let gain = estimate(text);
            assert!(gain.obstacle().is_none() && gain.over_dense() > 1.9, "{name}: {gain:?}");
        }
    }

    #[test]
    fn few_tokens_gain_at_no_half_width() {
        let gain = estimate(shipped("tiny_plain"));
        assert_eq!(gain.obstacle(), Some(Obstacle::Tokens), "{gain:?}");
        assert!(gain.over_dense() < 1.0, "{gain:?}");
    }

    #[test]
    fn wide_masks_gain_once_they_are_narrow_enough() {
        let with_density = |density: f64| {
            estimate(&shipped("wan_2_1_1_3b_480p").replace("density = 0.25", &format!("density = {density:.4}")))
        };
        let dense = with_density(1.0);
        assert_eq!(dense.obstacle(), Some(Obstacle::Density));
        assert!(dense.over_dense() < 1.0);
        // Of so many tokens, time is nearly in proportion to density.
        let affordable = with_density(dense.affordable_attention() / dense.dense_attention - 0.02);
        assert_eq!(affordable.obstacle(), None);
        assert!((LEAST_GAIN..LEAST_GAIN + 0.05).contains(&affordable.over_dense()), "{affordable:?}");
    }
}
