//! How long a layer takes, and what profiling gains over a dense layer: an estimate for an H200,
//! from rates that were measured on one.
//!
//! A dense layer is pack and attention. A profiled layer skips tiles of attention. In return it
//! profiles its heads, and packs temporal heads a second time; half of the heads are assumed to be.
//! Whether that pays depends on density and tokens.
//!
//! The rates come from BENCHMARKS.md at the root of the repository. The estimate is within 15% of
//! the layers there.

use crate::layout::{HeadType, Layout};
use crate::spec::Spec;
use crate::tiling::count_tiles;

/// Multiprocessors of an H200, and of an H100 SXM.
pub const MULTIPROCESSORS: u32 = 132;

/// A shape whose speedup is below this is said to gain nothing.
pub const LEAST_SPEEDUP: f64 = 1.05;

/// Bytes that packing and profiling move in a millisecond. BENCHMARKS.md has 3.4 to 3.8 TB/s for
/// all heads, and 2.4 to 3.5 for some of them.
const MEMORY: f64 = 3.4e9;

/// Milliseconds from one launch of a layer to the next. Short kernels do not hide them.
const LAUNCH: f64 = 5e-3;

/// Operations that full tiles of attention make in a millisecond on all multiprocessors. The second
/// number is the time of an edge tile over that of a full one.
///
/// The rates are those of heads whose softmax needs no offsets. They come from the dense and sparse
/// rows of BENCHMARKS.md, which count every pair of a visited tile. At head dim 128 they are 702 to
/// 759 TFLOP/s, with edges or without. At 64, dense heads reach 619 and 634. LTX's sparse heads, of
/// whose tiles 22% are edges, keep 88% of that.
const fn attention_rate(head_dim: u32) -> (f64, f64) {
    if head_dim == 64 { (625e9, 1.6) } else { (735e9, 1.0) }
}

/// The expected milliseconds of the parts of a layer, when all text is valid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerTimes {
    /// Attention when every head is dense.
    pub dense_attention: f64,
    /// Attention when half of the heads are spatial and half are temporal.
    pub sparse_attention: f64,
    /// Norm, RoPE and reordering of all heads.
    pub pack: f64,
    /// Profiling, which multiplies all sampled rows by all keys.
    pub profile: f64,
    /// Packing half of the heads again.
    pub repack: f64,
    /// Sparse attention if both half widths were one token.
    pub narrowest_attention: f64,
}

/// Why a shape gains nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The masks leave too much of attention. Smaller half widths would gain.
    Density,
    /// Attention is too short for what profiling costs. No half width would gain.
    Tokens,
}

impl LayerTimes {
    /// Estimates the times for a spec.
    pub fn estimate(spec: &Spec) -> LayerTimes {
        let heads = f64::from(spec.heads) * f64::from(spec.batch);
        let row = heads * f64::from(spec.head_dim);
        let tensor = spec.tensor_bytes(spec.batch, spec.heads) as f64;
        let (flop, edge) = attention_rate(spec.head_dim);
        let tiles = spec.tiles();
        let tile_flop = 4.0 * f64::from(tiles.query_rows) * f64::from(tiles.key_rows) * row;
        let attention = |layout: &Layout, head| {
            let counts = count_tiles(layout, head, tiles, layout.text_tokens);
            let work = (counts.full as f64 + edge * counts.edge as f64) * tile_flop;
            // One multiprocessor works on a query tile. If there are fewer of these, some have
            // nothing to do.
            let busy = (counts.query_tiles as f64 * heads / f64::from(MULTIPROCESSORS)).min(1.0);
            LAUNCH + work / (flop * busy)
        };
        let half_each =
            |layout: &Layout| (attention(layout, HeadType::Spatial) + attention(layout, HeadType::Temporal)) / 2.0;
        // There is one product with Q, and one with V for each mask. A multiply-add is 2
        // operations.
        let profile_flop = 8.0 * f64::from(spec.profile.rows) * f64::from(spec.layout.sequence()) * row;
        LayerTimes {
            dense_attention: attention(&spec.layout, HeadType::Dense),
            sparse_attention: half_each(&spec.layout),
            narrowest_attention: half_each(&Layout { spatial_half_width: 1, temporal_half_width: 1, ..spec.layout }),
            // Three tensors are read, and three are written.
            pack: LAUNCH + 6.0 * tensor / MEMORY,
            // There are two kernels. K and V are read once, and the products hide little of that.
            profile: 2.0 * LAUNCH + 2.0 * tensor / MEMORY + profile_flop / flop,
            repack: LAUNCH + 3.0 * tensor / MEMORY,
        }
    }

    /// Time of a layer whose heads are all dense.
    pub fn dense_layer(&self) -> f64 {
        self.pack + self.dense_attention
    }

    /// Time of a layer whose heads are profiled.
    pub fn layer(&self) -> f64 {
        self.pack + self.profile + self.repack + self.sparse_attention
    }

    /// Time of the dense layer over that of the profiled one.
    pub fn speedup(&self) -> f64 {
        self.dense_layer() / self.layer()
    }

    /// The time that sparse attention may take for a speedup of [`LEAST_SPEEDUP`]. It is negative
    /// when that is out of reach.
    pub fn affordable_attention(&self) -> f64 {
        self.dense_layer() / LEAST_SPEEDUP - self.pack - self.profile - self.repack
    }

    /// Why the speedup is less than [`LEAST_SPEEDUP`], if it is.
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
    use super::{LEAST_SPEEDUP, LayerTimes, Obstacle};
    use crate::models;
    use crate::spec::Spec;

    fn estimate(text: &str) -> LayerTimes {
        LayerTimes::estimate(&Spec::parse("test", text).unwrap_or_else(|error| panic!("{error}")))
    }

    fn shipped(name: &str) -> &'static str {
        models().iter().find(|(model, _)| *model == name).map_or("", |(_, text)| text)
    }

    /// The rows are milliseconds of dense attention, pack and the profiled layer in BENCHMARKS.md,
    /// for a number of batch items.
    #[test]
    fn comes_near_what_was_measured() {
        for (name, batch, dense, pack, layer) in [
            ("hunyuan_video_720p", 1, 232.538, 1.174, 62.639),
            ("wan_14b_720p", 2, 312.762, 2.511, 88.596),
            ("cogvideox_1_5_5b_768x1360", 2, 79.015, 0.887, 22.264),
            ("ltx_video_512x704", 2, 1.472, 0.122, 0.765),
            ("wan_2_1_1_3b_480p", 2, 17.457, 0.331, 5.148),
        ] {
            let times = estimate(&shipped(name).replace("batch = 1", &format!("batch = {batch}")));
            for (what, estimated, measured) in [
                ("dense", times.dense_layer(), dense + pack),
                ("profiled", times.layer(), layer),
                ("gain", times.speedup(), (dense + pack) / layer),
            ] {
                assert!((estimated / measured - 1.0).abs() < 0.15, "{name}, {what}: {estimated} for {measured}");
            }
        }
    }

    #[test]
    fn models_gain() {
        const LEAST: f64 = 1.9;
        for (name, text) in models().iter().filter(|(name, _)| !name.starts_with("tiny") && *name != "demo") {
            let times = estimate(text);
            assert!(
                times.obstacle().is_none() && times.speedup() > LEAST,
                "{name} gains a factor of {:.2} by this estimate, and shipped models are to gain more than {LEAST}: \
                 give it narrower masks, or a name that begins with tiny if it is for tests only: {times:?}",
                times.speedup()
            );
        }
    }

    #[test]
    fn few_tokens_gain_at_no_half_width() {
        let times = estimate(shipped("tiny_plain"));
        assert_eq!(times.obstacle(), Some(Obstacle::Tokens), "{times:?}");
        assert!(times.speedup() < 1.0, "{times:?}");
    }

    #[test]
    fn wide_masks_gain_once_they_are_narrow_enough() {
        let with_density = |density: f64| {
            estimate(&shipped("wan_2_1_1_3b_480p").replace("density = 0.25", &format!("density = {density:.4}")))
        };
        let dense = with_density(1.0);
        assert_eq!(dense.obstacle(), Some(Obstacle::Density));
        assert!(dense.speedup() < 1.0);
        // With so many tokens, time is nearly in proportion to density.
        let affordable = with_density(dense.affordable_attention() / dense.dense_attention - 0.02);
        assert_eq!(affordable.obstacle(), None);
        assert!((LEAST_SPEEDUP..LEAST_SPEEDUP + 0.05).contains(&affordable.speedup()), "{affordable:?}");
    }
}
