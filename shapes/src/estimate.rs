//! How long a layer takes, and what profiling gains over a dense layer: an estimate for a GPU, from
//! [`Rates`] that were measured on it.
//!
//! A dense layer is pack and attention. A profiled layer skips tiles of attention. In return it
//! profiles its heads, and packs temporal heads a second time; half of the heads are assumed to be.
//! So did the kernels that were measured. Today's pack Q once, which is a ninth less. Whether that
//! pays depends on density and tokens.
//!
//! The rates come from `bench/results`, which BENCHMARKS.md shows. The estimate is within 15% of
//! the layers there.

use crate::arch::Arch;
use crate::blocks::SAMPLE_ROWS;
use crate::layout::{HeadType, Layout};
use crate::spec::Spec;
use crate::tiling::count_tiles;

/// Multiprocessors of an H200, and of an H100 SXM.
pub const MULTIPROCESSORS: u32 = 132;

/// A shape whose speedup is below this is said to gain nothing.
pub const LEAST_SPEEDUP: f64 = 1.05;

/// Milliseconds from one launch of a layer to the next. Short kernels do not hide them.
const LAUNCH: f64 = 5e-3;

/// What one kind of GPU does in a millisecond, as it was measured. Softmax needs no offsets there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Short name of the GPU, as in `h100`.
    pub gpu: &'static str,
    /// The name that the driver gives it.
    pub device: &'static str,
    /// Bytes that packing moves.
    memory: f64,
    /// Bytes of K and V that profiling reads for up to 64 rows of each head.
    profile: f64,
    /// Attention of head dim 64.
    narrow: AttentionRate,
    /// Attention of head dim 128.
    wide: AttentionRate,
}

/// Operations of attention in a millisecond on all multiprocessors. Every pair of a visited tile
/// counts.
#[derive(Clone, Copy, Debug, PartialEq)]
struct AttentionRate {
    /// Operations on full tiles.
    full: f64,
    /// The time of an edge tile over that of a full one.
    edge: f64,
}

impl Rates {
    /// An H100 SXM, measured on 2026-11-26. The kernels of today have other code in **profile**,
    /// which made no difference beyond noise to a layer.
    ///
    /// Packing moves 2.8 TB/s, and 2.7 for temporal heads. Profiling reads 2.8 TB/s, and 2.2 in the
    /// shortest layers. At head dim 128, attention has 763 to 774 TFLOP/s dense and 735 to 804
    /// sparse. At 64 it has 633 and 662 dense. Sparse heads keep 96% of that with 7% of edge tiles,
    /// and 90% with 22%.
    pub const H100: Rates = Rates {
        gpu: "h100",
        device: "NVIDIA H100 80GB HBM3",
        memory: 2.75e9,
        profile: 2.6e9,
        narrow: AttentionRate { full: 640e9, edge: 1.5 },
        wide: AttentionRate { full: 755e9, edge: 1.0 },
    };

    /// An H200, measured on 2026-11-28.
    ///
    /// Packing moves 3.4 to 3.8 TB/s, and 3.2 to 3.6 for temporal heads. Profiling reads 2.5 to 3.2
    /// TB/s. At head dim 128, attention has 760 to 772 TFLOP/s dense and 702 to 749 sparse. At 64
    /// it has 624 dense. Sparse heads keep 93% of that with 7% of edge tiles, and 80% with 22%.
    pub const H200: Rates = Rates {
        gpu: "h200",
        device: "NVIDIA H200",
        memory: 3.6e9,
        profile: 2.9e9,
        narrow: AttentionRate { full: 625e9, edge: 1.6 },
        wide: AttentionRate { full: 750e9, edge: 1.0 },
    };

    /// The GPUs that were measured.
    pub const ALL: [Rates; 2] = [Rates::H100, Rates::H200];

    /// The rates of the GPU that has this name for its driver. Others of the same chip have other
    /// clocks or another memory, and were not measured.
    pub fn of_device(name: &str) -> Option<Rates> {
        Rates::ALL.into_iter().find(|rates| rates.device == name)
    }

    const fn attention(&self, head_dim: u32) -> AttentionRate {
        if head_dim == 64 { self.narrow } else { self.wide }
    }
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
    /// Estimates the times of a spec's layer on a GPU.
    pub fn estimate(spec: &Spec, rates: &Rates) -> LayerTimes {
        let heads = f64::from(spec.heads) * f64::from(spec.batch);
        let row = heads * f64::from(spec.head_dim);
        let tensor = spec.tensor_bytes(spec.batch, spec.heads) as f64;
        let AttentionRate { full, edge } = rates.attention(spec.head_dim);
        // The rates are those of Hopper.
        let tiles = spec.tiles(Arch::SM_90A);
        let tile_flop = 4.0 * f64::from(tiles.query_rows) * f64::from(tiles.key_rows) * row;
        let attention = |layout: &Layout, head| {
            let counts = count_tiles(layout, head, tiles, layout.text_tokens());
            let work = (counts.full as f64 + edge * counts.edge as f64) * tile_flop;
            // One multiprocessor works on a query tile. If there are fewer of these, some have
            // nothing to do.
            let busy = (counts.query_tiles as f64 * heads / f64::from(MULTIPROCESSORS)).min(1.0);
            LAUNCH + work / (full * busy)
        };
        let half_each =
            |layout: &Layout| (attention(layout, HeadType::Spatial) + attention(layout, HeadType::Temporal)) / 2.0;
        // The products of the first group of rows run while K and V are read, those of the others
        // take time of their own. There is one with Q, and one with V for each mask. A multiply-add
        // is 2 operations.
        let more_rows = (spec.partials(1).groups - 1) * SAMPLE_ROWS;
        let more_flop = 8.0 * f64::from(more_rows) * f64::from(spec.layout.sequence()) * row;
        LayerTimes {
            dense_attention: attention(&spec.layout, HeadType::Dense),
            sparse_attention: half_each(&spec.layout),
            narrowest_attention: half_each(&Layout { spatial_half_width: 1, temporal_half_width: 1, ..spec.layout }),
            // Three tensors are read, and three are written.
            pack: LAUNCH + 6.0 * tensor / rates.memory,
            // There are two kernels. K and V are read once.
            profile: 2.0 * LAUNCH + 2.0 * tensor / rates.profile + more_flop / full,
            repack: LAUNCH + 3.0 * tensor / rates.memory,
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
    use super::{LEAST_SPEEDUP, LayerTimes, Obstacle, Rates};
    use crate::models;
    use crate::spec::{Spec, Width};
    use serde_json::Value;

    fn spec(text: &str) -> Spec {
        Spec::parse("test", text).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The estimates for all GPUs.
    fn estimates(text: &str) -> [LayerTimes; Rates::ALL.len()] {
        let spec = spec(text);
        Rates::ALL.map(|rates| LayerTimes::estimate(&spec, &rates))
    }

    fn shipped(name: &str) -> &'static str {
        models().iter().find(|(model, _)| *model == name).map_or("", |(_, text)| text)
    }

    /// Every shape of the stored results is a shipped spec, some with another batch.
    #[test]
    fn comes_near_what_was_measured() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/results");
        let mut compared = 0;
        for file in ["nvidia_h100_80gb_hbm3.json", "nvidia_h200_templates.json", "nvidia_h200_minimax_h3.json"] {
            let text = std::fs::read_to_string(folder.join(file)).expect("stored results");
            let results: Value = serde_json::from_str(&text).expect("JSON");
            let rates = results["gpu"].as_str().and_then(Rates::of_device).expect("the name of a GPU with rates");
            for (name, shape) in results["shapes"].as_object().expect("shapes") {
                let batch = shape["batch"].as_u64().and_then(|batch| u32::try_from(batch).ok()).expect("a batch");
                let spec = spec(shipped(name)).to_builder().batch(batch).build().expect("a good spec");
                let measured = |what: &str| {
                    let mut rows = results["rows"].as_array().expect("rows").iter();
                    let found = rows.find(|row| {
                        row["shape"] == name.as_str()
                            && row["who"] == "framestride"
                            && row["what"] == what
                            && row["mask"].is_null()
                    });
                    found.and_then(|row| row["ms"].as_f64()).unwrap_or_else(|| panic!("{file}: no {what} of {name}"))
                };
                let times = LayerTimes::estimate(&spec, &rates);
                let (dense, layer) = (measured("dense") + measured("pack"), measured("layer"));
                for (what, estimated, measured) in [
                    ("dense", times.dense_layer(), dense),
                    ("profiled", times.layer(), layer),
                    ("gain", times.speedup(), dense / layer),
                    ("pack", times.pack, measured("pack")),
                    ("profiling", times.profile, measured("profile") + measured("select")),
                ] {
                    // The shortest kernels vary most.
                    let most = if what == "profiling" || what == "pack" { 0.25 } else { 0.15 };
                    let error = (estimated / measured - 1.0).abs();
                    assert!(error < most, "{} {name}, {what}: {estimated} for {measured}", rates.gpu);
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, (5 + 4 + 2) * 5);
    }

    #[test]
    fn models_gain() {
        const LEAST: f64 = 1.9;
        for (name, text) in models().iter().filter(|(name, _)| !name.starts_with("tiny") && *name != "demo") {
            for times in estimates(text) {
                assert!(
                    times.obstacle().is_none() && times.speedup() > LEAST,
                    "{name} gains a factor of {:.2} by this estimate, and shipped models are to gain more than {LEAST}: \
                     give it narrower masks, or a name that begins with tiny if it is for tests only: {times:?}",
                    times.speedup()
                );
            }
        }
    }

    #[test]
    fn few_tokens_gain_at_no_half_width() {
        for times in estimates(shipped("tiny_plain")) {
            assert_eq!(times.obstacle(), Some(Obstacle::Tokens), "{times:?}");
            assert!(times.speedup() < 1.0, "{times:?}");
        }
    }

    #[test]
    fn wide_masks_gain_once_they_are_narrow_enough() {
        let model = spec(shipped("wan_2_1_1_3b_480p"));
        for rates in Rates::ALL {
            let with_density = |density: f64| {
                let width = Width::Density(density);
                let spec = model.to_builder().spatial(width).temporal(width).build().expect("a good spec");
                LayerTimes::estimate(&spec, &rates)
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
}
