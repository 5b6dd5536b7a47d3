//! From a checked call to its launches: grids and parameters of the kernels.

use std::ops::Range;

use framestride_shapes::blocks::{MOST_SPLITS, PROFILE_KEY_ROWS, PackBlock};
use framestride_shapes::params::{AttentionParams, PackParams, PackPass, ProfileParams, SelectParams};
use framestride_shapes::spec::Spec;
use framestride_shapes::workspace::WorkspaceLayout;

use crate::call::{TensorShape, check_call, check_half_widths, check_scale, is_aligned};
use crate::error::Result;
use crate::launch::{Kernel, Launch, Launches, Params, Profiling};
use crate::layer::{HeadTypes, Layer, SparseAttention};
use crate::workspace::Workspace;

impl SparseAttention {
    /// Checks a call and writes its launches.
    ///
    /// # Errors
    /// An [`Error::Input`](crate::Error::Input) for whatever is wrong with the arguments.
    pub fn launches(&self, layer: &Layer, types: HeadTypes, workspace: &Workspace) -> Result<Launches> {
        let spec = self.module.spec();
        let shape = TensorShape {
            batch: self.batch,
            rows: spec.layout.sequence(),
            heads: self.heads,
            head_dim: spec.head_dim,
            element: spec.dtype.bytes().into(),
        };
        let scale = layer.scale.unwrap_or(1.0 / (spec.head_dim as f32).sqrt());
        check_scale(spec, scale)?;
        let own = [spec.layout.spatial_half_width, spec.layout.temporal_half_width];
        let half_widths = layer.half_widths.unwrap_or(own);
        check_half_widths(spec, half_widths)?;
        let [spatial_half_width, temporal_half_width] = half_widths;
        workspace.check(self.module.device(), &self.workspace)?;
        check_call(spec, shape, layer, types, workspace.address(), &self.workspace)?;

        let part = |range: &Range<u64>| workspace.address() + range.start;
        let packed = [&self.workspace.packed_q, &self.workspace.packed_k, &self.workspace.packed_v].map(part);
        let (batch, heads, splits) = (self.batch, self.heads, self.splits);
        let own_types = part(&self.workspace.head_types);
        let (pack_types, attention_types) = match types {
            HeadTypes::Profiled => (0, own_types),
            HeadTypes::Dense => (0, 0),
            HeadTypes::Given(address) => (address, address),
        };
        let pack = |pass: PackPass, head_types: u64| {
            let aligned = [layer.q, layer.k, layer.v].iter().all(|tensor| is_aligned(tensor, shape));
            let params = Params::Pack(PackParams {
                q: layer.q,
                k: layer.k,
                v: layer.v,
                q_norm: layer.q_norm,
                k_norm: layer.k_norm,
                q_norm_before: layer.before.q_norm.unwrap_or(layer.q_norm),
                k_norm_before: layer.before.k_norm.unwrap_or(layer.k_norm),
                q_norm_after: layer.after.q_norm.unwrap_or(layer.q_norm),
                k_norm_after: layer.after.k_norm.unwrap_or(layer.k_norm),
                cos: layer.cos,
                sin: layer.sin,
                rope_batch: layer.rope_batch,
                before_lengths: layer.before.lengths,
                after_lengths: layer.after.lengths,
                head_types,
                packed_q: packed[0],
                packed_k: packed[1],
                packed_v: packed[2],
                schedule: part(&self.workspace.schedule),
                batch,
                heads,
                scale_log2: scale * std::f32::consts::LOG2_E,
                pass: pass as u32,
                aligned: aligned.into(),
                reserved: 0,
            });
            let warps = PackBlock::new(spec.heads, spec.image()).warps;
            self.write(Kernel::Pack, [spec.layout.packed_rows() / warps, 3, batch], params)
        };
        let attention = || {
            let params = Params::Attention(AttentionParams {
                packed_q: packed[0],
                packed_k: packed[1],
                packed_v: packed[2],
                out: layer.out,
                lse: layer.lse,
                head_types: attention_types,
                before_lengths: layer.before.lengths,
                after_lengths: layer.after.lengths,
                schedule: part(&self.workspace.schedule),
                batch,
                heads,
                aligned: is_aligned(&layer.out, shape).into(),
                spatial_half_width,
                temporal_half_width,
                reserved: 0,
            });
            let items = u64::from(shape.rows.div_ceil(spec.tiles().query_rows)) * u64::from(batch * heads);
            let min_blocks = self.module.resources(Kernel::Attention).min_blocks;
            let blocks = u64::from(self.module.device().multiprocessors()) * u64::from(min_blocks);
            self.write(Kernel::Attention, [items.min(blocks) as u32, 1, 1], params)
        };
        let profiling = || {
            let (partials, errors) = (part(&self.workspace.partials), part(&self.workspace.errors));
            let profile = Params::Profile(ProfileParams {
                packed_q: packed[0],
                packed_k: packed[1],
                packed_v: packed[2],
                before_lengths: layer.before.lengths,
                after_lengths: layer.after.lengths,
                partials,
                seed: layer.seed.unwrap_or(spec.profile.seed),
                batch,
                heads,
                splits,
                spatial_half_width,
                temporal_half_width,
                reserved: 0,
            });
            let select = Params::Select(SelectParams {
                partials,
                errors,
                head_types: own_types,
                batch,
                heads,
                splits,
                reserved: 0,
            });
            let groups = spec.partials(splits).groups;
            Profiling {
                profile: self.write(Kernel::Profile, [splits, groups, batch * heads], profile),
                select: self.write(Kernel::Select, [1, 1, batch * heads], select),
                repack: pack(PackPass::Temporal, own_types),
            }
        };
        Ok(Launches {
            pack: pack(PackPass::All, pack_types),
            profiling: (types == HeadTypes::Profiled).then(profiling),
            attention: attention(),
        })
    }

    /// A launch with the block that the manifest says.
    fn write(&self, kernel: Kernel, grid: [u32; 3], params: Params) -> Launch {
        let resources = self.module.resources(kernel);
        Launch { kernel, grid, threads: resources.threads, shared_bytes: resources.shared_bytes, params }
    }
}

/// Where everything lies in the workspace of a launch with `batch` items of `heads` heads, on a
/// device with so many multiprocessors.
///
/// With it, memory can be planned before a device and kernels are there.
/// [`SparseAttention::workspace_layout`] is the same for a module.
#[must_use]
pub fn workspace_layout(spec: &Spec, batch: u32, heads: u32, multiprocessors: u32) -> WorkspaceLayout {
    spec.workspace(batch, heads, profile_splits(spec, batch, heads, multiprocessors))
}

/// Into how many parts profiling divides the keys of a head. Each block takes one part.
pub(crate) fn profile_splits(spec: &Spec, batch: u32, heads: u32, multiprocessors: u32) -> u32 {
    let key_tiles = spec.layout.sequence().div_ceil(PROFILE_KEY_ROWS);
    let blocks = u64::from(batch) * u64::from(heads) * u64::from(spec.partials(1).groups);
    splits_of(blocks, multiprocessors.max(1), key_tiles.clamp(1, MOST_SPLITS))
}

/// The fewest parts, up to `most`, whose time is within 5% of the best.
///
/// A multiprocessor holds one block. So the time is the number of waves of blocks times the keys of
/// a block.
fn splits_of(blocks: u64, multiprocessors: u32, most: u32) -> u32 {
    let waves = |splits: u32| (u128::from(blocks) * u128::from(splits)).div_ceil(multiprocessors.into());
    let time = |splits: u32| waves(splits) as f64 / f64::from(splits);
    let best = (1..=most).map(time).fold(f64::INFINITY, f64::min);
    (1..=most).find(|&splits| time(splits) <= 1.05 * best).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::splits_of;

    #[test]
    fn splits_fill_whole_waves() {
        // Each row has the blocks of one split, multiprocessors, the most splits, and the splits
        // that are expected.
        for (blocks, multiprocessors, most, splits) in
            [(24, 132, 32, 11), (96, 132, 16, 4), (132, 132, 32, 1), (1, 132, 32, 31), (24, 132, 3, 3), (4, 4, 19, 1)]
        {
            assert_eq!(splits_of(blocks, multiprocessors, most), splits, "{blocks} blocks");
        }
    }
}
