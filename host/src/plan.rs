//! From a checked call to its launches: grids and parameters of the kernels.

use std::ops::Range;

use framestride_shapes::arch::Arch;
use framestride_shapes::blocks::{
    MOST_SPLITS, PROFILE_KEY_ROWS, PackBlock, VALUES_THREADS, VALUES_UNITS, profile_min_blocks,
};
use framestride_shapes::dtype::Compute;
use framestride_shapes::image::e4m3::UNIT_KEYS;
use framestride_shapes::layout::HeadType;
use framestride_shapes::params::{
    AttentionParams, JudgeParams, PackParams, PackPass, ProfileParams, SelectParams, Tensor,
};
use framestride_shapes::spec::Spec;
use framestride_shapes::workspace::WorkspaceLayout;

use crate::call::{Purpose, TensorShape, check_call, check_half_widths, check_scale, given_tensors, is_aligned};
use crate::error::Result;
use crate::launch::{EightBits, Kernel, Launch, Launches, Params, ProfiledKeys, Profiling, SixteenBits};
use crate::layer::{HeadTypes, Layer, SparseAttention, Text};
use crate::workspace::Workspace;

impl SparseAttention {
    /// Checks a call and writes its launches.
    ///
    /// # Errors
    /// An [`Error::Input`](crate::Error::Input) for whatever is wrong with the arguments.
    pub fn launches(&self, layer: &Layer, types: HeadTypes, workspace: &Workspace) -> Result<Launches> {
        let precisions = Precisions::of(self.module.spec(), layer, types);
        let call = Call::check(self, layer, Purpose::Attend(types, precisions), workspace)?;
        let head_types = match types {
            HeadTypes::Profiled => call.found_head_types(),
            HeadTypes::Dense => 0,
            HeadTypes::Given(address) => address,
        };
        let profiles = types == HeadTypes::Profiled;
        // Precisions of the heads, as the kernels in 8 and in 16 bits read them.
        let [in_8, in_16] = match precisions {
            Precisions::All(_) => [0, 0],
            Precisions::Given(address) => [address, address],
            Precisions::Found(_) => [0, call.found_precisions()],
        };
        // In 8 bits, attention has images of its own in place of those that profiling had read.
        let has_images = profiles && precisions == Precisions::All(Compute::Dtype);
        let pass = if has_images { PackPass::AfterProfiling } else { PackPass::All };
        let pack = |kernel| call.pack(kernel, PackPass::All, ALL_KEYS, head_types, in_8);
        Ok(Launches {
            profiling: profiles.then(|| call.profiling()),
            eight_bits: (precisions != Precisions::All(Compute::Dtype)).then(|| EightBits {
                center: pack(Kernel::Center),
                pack: pack(Kernel::PackE4m3),
                pack_values: pack(Kernel::PackValues),
                attention: call.attention(Kernel::AttentionE4m3, head_types, in_8),
                judge: match precisions {
                    Precisions::Found(largest_error) => Some(call.judge(head_types, largest_error)),
                    _ => None,
                },
            }),
            sixteen_bits: (precisions != Precisions::All(Compute::E4m3)).then(|| SixteenBits {
                pack: call.pack(Kernel::Pack, pass, ALL_KEYS, head_types, in_16),
                attention: call.attention(Kernel::Attention, head_types, in_16),
            }),
        })
    }

    /// Checks a call that only profiles, and writes its launches.
    #[doc(hidden)]
    pub fn profile_launches(&self, layer: &Layer, workspace: &Workspace) -> Result<Profiling> {
        Ok(Call::check(self, layer, Purpose::Profile, workspace)?.profiling())
    }
}

/// In which precisions the heads of a call multiply.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Precisions {
    /// All in one.
    All(Compute),
    /// Each as memory at this address says.
    Given(u64),
    /// Each in 8 bits, and again in 16 where its error is larger than this.
    Found(f32),
}

impl Precisions {
    fn of(spec: &Spec, layer: &Layer, types: HeadTypes) -> Precisions {
        match (layer.precisions, spec.largest_error, types) {
            (0, None, _) => Precisions::All(spec.compute),
            (0, Some(error), HeadTypes::Profiled) => Precisions::Found(error as f32),
            // There is nothing to compare with, and the bound holds in 16 bits.
            (0, Some(_), _) => Precisions::All(Compute::Dtype),
            (address, ..) => Precisions::Given(address),
        }
    }
}

/// A checked call, which writes its launches.
struct Call<'a> {
    plan: &'a SparseAttention,
    layer: &'a Layer,
    /// Address of the workspace.
    workspace: u64,
    shape: TensorShape,
    scale: f32,
    half_widths: [u32; HeadType::CANDIDATES.len()],
}

impl<'a> Call<'a> {
    fn check(plan: &'a SparseAttention, layer: &'a Layer, purpose: Purpose, workspace: &Workspace) -> Result<Call<'a>> {
        let (spec, device) = (plan.module.spec(), plan.module.device());
        let shape = TensorShape {
            batch: plan.batch,
            rows: spec.layout.sequence(),
            heads: plan.heads,
            head_dim: spec.head_dim,
            element: spec.dtype.bytes().into(),
        };
        let scale = layer.scale.unwrap_or(1.0 / (spec.head_dim as f32).sqrt());
        check_scale(spec, scale)?;
        let own = [spec.layout.spatial_half_width, spec.layout.temporal_half_width];
        let half_widths = layer.half_widths.unwrap_or(own);
        check_half_widths(spec, half_widths)?;
        workspace.check(device, &plan.workspace)?;
        check_call(device, spec, shape, layer, purpose, workspace.address(), &plan.workspace)?;
        Ok(Call { plan, layer, workspace: workspace.address(), shape, scale, half_widths })
    }

    /// Address of a part of the workspace.
    fn part(&self, part: &Range<u64>) -> u64 {
        self.workspace + part.start
    }

    /// Addresses of packed Q, K and V as this kernel of attention, or of what packs for it, has
    /// them.
    fn packed(&self, kernel: Kernel) -> [u64; 3] {
        let WorkspaceLayout { packed, packed_e4m3, .. } = &self.plan.workspace;
        let parts = if kernel.has_e4m3_images() { packed_e4m3 } else { packed };
        parts.each_ref().map(|part| self.part(part))
    }

    /// Addresses of the sampled rows of packed Q, and of packed K and V as profile reads them. Only
    /// rows from `first_key` on are there, and the addresses are those that row 0 would have.
    fn profiled(&self, first_key: u32) -> [u64; 3] {
        let WorkspaceLayout { samples, profiled_k, profiled_v, .. } = &self.plan.workspace;
        let skipped = u64::from(self.plan.module.spec().image().bytes(first_key));
        let row_0 = |part| self.part(part).wrapping_sub(skipped);
        [self.part(samples), row_0(profiled_k), row_0(profiled_v)]
    }

    /// Seed of the rows that are sampled.
    fn seed(&self) -> u64 {
        self.layer.seed.unwrap_or(self.plan.module.spec().profile.seed)
    }

    /// Where the types go that profiling finds.
    fn found_head_types(&self) -> u64 {
        match self.layer.found.head_types {
            0 => self.part(&self.plan.workspace.head_types),
            address => address,
        }
    }

    /// Where the precisions go that **judge** finds.
    fn found_precisions(&self) -> u64 {
        match self.layer.found.precisions {
            0 => self.part(&self.plan.workspace.precisions),
            address => address,
        }
    }

    /// What finds the types of the heads.
    fn profiling(&self) -> Profiling {
        let launches = profile_launches(self.plan.module.spec());
        let (rows, splits) = (self.plan.workspace.profiled_rows, self.plan.splits / launches);
        let of_keys = |index: u32| {
            let keys = [index * rows, (index + 1) * rows];
            let pack = self.pack(Kernel::Pack, PackPass::BeforeProfiling, keys, 0, 0);
            ProfiledKeys { pack, profile: self.profile(keys, index * splits, splits) }
        };
        let other_keys = (launches == 2).then(|| of_keys(1));
        Profiling { keys: of_keys(0), other_keys, select: self.select() }
    }

    /// A launch of pack, or of another kernel with its parameters. Before profiling it packs keys
    /// from the first of two packed rows to the second.
    fn pack(
        &self,
        kernel: Kernel,
        pass: PackPass,
        [first_key, end_key]: [u32; 2],
        head_types: u64,
        precisions: u64,
    ) -> Launch {
        let (spec, layer) = (self.plan.module.spec(), self.layer);
        let [packed_q, packed_k, packed_v] = match pass {
            PackPass::BeforeProfiling => self.profiled(first_key),
            PackPass::All | PackPass::AfterProfiling => self.packed(kernel),
        };
        let [[q, q_before, q_after], [k, k_before, k_after], [v, v_before, v_after]] =
            [0, 1, 2].map(|operand| row_groups(spec, layer, operand));
        let aligned = given_tensors(spec, self.shape, layer).all(|(_, tensor, shape)| is_aligned(&tensor, shape));
        let params = Params::Pack(PackParams {
            q,
            k,
            v,
            q_before,
            k_before,
            v_before,
            q_after,
            k_after,
            v_after,
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
            packed_q,
            packed_k,
            packed_v,
            seed: self.seed(),
            schedule: self.part(&self.plan.workspace.schedule),
            centers: self.part(&self.plan.workspace.centers),
            precisions,
            batch: self.plan.batch,
            heads: self.plan.heads,
            scale_log2: self.scale * std::f32::consts::LOG2_E,
            pass: pass as u32,
            aligned: aligned.into(),
            first_key,
            end_key,
            reserved: 0,
        });
        let (rows, batch, heads) = (spec.layout.packed_rows(), self.plan.batch, self.plan.heads);
        let warps = PackBlock::new(self.plan.module.arch(), spec.heads, spec.image()).warps;
        let row_blocks = rows / warps;
        let sample_blocks = heads * spec.partials(1).group_rows() / warps;
        let unit_blocks = rows.div_ceil(UNIT_KEYS).div_ceil(VALUES_THREADS / 32 * VALUES_UNITS);
        let grid = match kernel {
            Kernel::Center => [batch * heads, 1, 1],
            Kernel::PackE4m3 => [row_blocks, 2, batch],
            Kernel::PackValues => [unit_blocks * heads, batch, 1],
            // Blocks of an item, row by row and then for its samples, lie in two columns.
            _ if pass == PackPass::BeforeProfiling => {
                [row_blocks + if first_key == 0 { sample_blocks.div_ceil(2) } else { 0 }, 2, batch]
            }
            _ => [row_blocks, 3, batch],
        };
        self.launch(kernel, grid, params)
    }

    /// Profiles keys from the first of two packed rows to the second. Its splits are `splits` of
    /// the call's, from `first_split` on.
    fn profile(&self, [first_key, end_key]: [u32; 2], first_split: u32, splits: u32) -> Launch {
        let partials = self.plan.partials();
        let [samples, packed_k, packed_v] = self.profiled(first_key);
        let [spatial_half_width, temporal_half_width] = self.half_widths;
        let (batch, heads) = (self.plan.batch, self.plan.heads);
        let params = Params::Profile(ProfileParams {
            samples,
            packed_k,
            packed_v,
            before_lengths: self.layer.before.lengths,
            after_lengths: self.layer.after.lengths,
            partials: self.part(&self.plan.workspace.partials) + partials.offset(0, 0, first_split) * 4,
            seed: self.seed(),
            batch,
            heads,
            splits: self.plan.splits,
            spatial_half_width,
            temporal_half_width,
            first_key,
            end_key,
            reserved: 0,
        });
        self.launch(Kernel::Profile, [splits, partials.groups, batch * heads], params)
    }

    fn select(&self) -> Launch {
        let (batch, heads) = (self.plan.batch, self.plan.heads);
        let params = Params::Select(SelectParams {
            partials: self.part(&self.plan.workspace.partials),
            errors: match self.layer.found.errors {
                0 => self.part(&self.plan.workspace.errors),
                address => address,
            },
            head_types: self.found_head_types(),
            batch,
            heads,
            splits: self.plan.splits,
            reserved: 0,
        });
        self.launch(Kernel::Select, [1, 1, batch * heads], params)
    }

    fn judge(&self, head_types: u64, largest_error: f32) -> Launch {
        let (batch, heads) = (self.plan.batch, self.plan.heads);
        let params = Params::Judge(JudgeParams {
            partials: self.part(&self.plan.workspace.partials),
            out: self.layer.out,
            head_types,
            centers: self.part(&self.plan.workspace.centers),
            errors: match self.layer.found.precision_errors {
                0 => self.part(&self.plan.workspace.precision_errors),
                address => address,
            },
            precisions: self.found_precisions(),
            seed: self.seed(),
            batch,
            heads,
            splits: self.plan.splits,
            largest_error,
        });
        self.launch(Kernel::Judge, [1, 1, batch * heads], params)
    }

    fn attention(&self, kernel: Kernel, head_types: u64, precisions: u64) -> Launch {
        let (spec, module) = (self.plan.module.spec(), &self.plan.module);
        let [packed_q, packed_k, packed_v] = self.packed(kernel);
        let [spatial_half_width, temporal_half_width] = self.half_widths;
        let (batch, heads) = (self.plan.batch, self.plan.heads);
        let params = Params::Attention(AttentionParams {
            packed_q,
            packed_k,
            packed_v,
            out: self.layer.out,
            lse: self.layer.lse,
            head_types,
            before_lengths: self.layer.before.lengths,
            after_lengths: self.layer.after.lengths,
            schedule: self.part(&self.plan.workspace.schedule),
            centers: self.part(&self.plan.workspace.centers),
            precisions,
            batch,
            heads,
            aligned: is_aligned(&self.layer.out, self.shape).into(),
            spatial_half_width,
            temporal_half_width,
            reserved: 0,
        });
        let items =
            u64::from(self.shape.rows.div_ceil(spec.tiles(module.arch()).query_rows)) * u64::from(batch * heads);
        let resources = module.resources(kernel);
        let resident = module.device().resident_blocks(module.arch(), resources.shared_bytes, resources.min_blocks);
        let blocks = u64::from(module.device().multiprocessors()) * u64::from(resident);
        self.launch(kernel, [items.min(blocks) as u32, 1, 1], params)
    }

    /// A launch with the block that the manifest says.
    fn launch(&self, kernel: Kernel, grid: [u32; 3], params: Params) -> Launch {
        let resources = self.plan.module.resources(kernel);
        Launch { kernel, grid, threads: resources.threads, shared_bytes: resources.shared_bytes, params }
    }
}

/// Where pack finds one of Q, K and V, by its number: video rows, the text before the video, and
/// the text after it.
///
/// Pack counts rows in the whole sequence. So the address of a tensor without the first rows is
/// moved back to where row 0 would lie.
fn row_groups(spec: &Spec, layer: &Layer, operand: usize) -> [Tensor; 3] {
    let from_row = |tensor: Tensor, first: u32| {
        let skipped = tensor.row.wrapping_mul(u64::from(first) * u64::from(spec.dtype.bytes()));
        Tensor { data: tensor.data.wrapping_sub(skipped), ..tensor }
    };
    let own = |text: &Text| text.qkv.map(|qkv| qkv[operand]);
    let before = own(&layer.before);
    let joined = from_row([layer.q, layer.k, layer.v][operand], before.map_or(0, |_| spec.layout.before));
    let first_after = spec.layout.before + spec.layout.video_tokens();
    let after = own(&layer.after).map(|tensor| from_row(tensor, first_after));
    [joined, before.unwrap_or(joined), after.unwrap_or(joined)]
}

/// Where everything lies in the workspace of a launch with `batch` items of `heads` heads, for
/// kernels of a family on a device with so many multiprocessors.
///
/// With it, memory can be planned before a device and kernels are there.
/// [`SparseAttention::workspace_layout`] is the same for a module.
#[must_use]
pub fn workspace_layout(spec: &Spec, arch: Arch, batch: u32, heads: u32, multiprocessors: u32) -> WorkspaceLayout {
    spec.workspace(batch, heads, profile_splits(spec, arch, batch, heads, multiprocessors))
}

/// Into how many parts profiling divides the keys of a head. Each block takes one part. Where two
/// launches share the keys, each has half of the parts.
pub(crate) fn profile_splits(spec: &Spec, arch: Arch, batch: u32, heads: u32, multiprocessors: u32) -> u32 {
    let launches = profile_launches(spec);
    let key_tiles = spec.layout.sequence().div_ceil(PROFILE_KEY_ROWS);
    let blocks = u64::from(batch) * u64::from(heads) * u64::from(spec.partials(1).groups);
    let most = (key_tiles / launches).clamp(1, MOST_SPLITS / launches);
    let at_once = multiprocessors.max(1) * profile_min_blocks(arch, spec.head_dim);
    launches * splits_of(blocks, at_once, most)
}

/// How many launches of **profile** share the keys.
fn profile_launches(spec: &Spec) -> u32 {
    if spec.profiled_rows() < spec.layout.packed_rows() { 2 } else { 1 }
}

/// What is said of keys where all are packed.
const ALL_KEYS: [u32; 2] = [0, u32::MAX];

/// The fewest parts, up to `most`, whose time is within 5% of the best.
///
/// The device holds `at_once` blocks. So the time is the number of waves of blocks times the keys
/// of a block.
fn splits_of(blocks: u64, at_once: u32, most: u32) -> u32 {
    let waves = |splits: u32| (u128::from(blocks) * u128::from(splits)).div_ceil(at_once.into());
    let time = |splits: u32| waves(splits) as f64 / f64::from(splits);
    let best = (1..=most).map(time).fold(f64::INFINITY, f64::min);
    (1..=most).find(|&splits| time(splits) <= 1.05 * best).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::splits_of;

    #[test]
    fn splits_fill_whole_waves() {
        // Each row has the blocks of one split, those at once, the most splits, and the splits that
        // are expected.
        for (blocks, at_once, most, splits) in
            [(24, 132, 32, 11), (96, 132, 16, 4), (132, 132, 32, 1), (1, 132, 32, 31), (24, 132, 3, 3), (4, 4, 19, 1)]
        {
            assert_eq!(splits_of(blocks, at_once, most), splits, "{blocks} blocks");
        }
    }
}
