//! Sparse attention of one layer: [`SparseAttention::forward`].
//!
//! ```text
//! head types        launches
//! Profiled          pack(all, spatial layout) -> profile -> select -> pack(temporal heads) -> attention
//! Given             pack(all, by type) -> attention
//! Dense             pack(all, spatial layout) -> attention
//! ```
//!
//! Everything is checked before the first launch, and nothing is allocated or waited for: the whole can be captured in a CUDA
//! graph. What profiling found stays in the workspace ([`SparseAttention::read_profile`]).

use std::ops::Range;
use std::sync::Arc;

use framestride_shapes::launch::{
    AttentionParams, MOST_SPLITS, NormWeights, PROFILE_KEY_ROWS, PackParams, PackPass, ProfileParams, SelectParams,
    Tensor, pack_warps,
};
use framestride_shapes::layout::HeadType;
use framestride_shapes::spec::{NormKind, Spec};
use framestride_shapes::workspace::{self, Workspace as Plan};

use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::inputs::check_heads;
use crate::launch::{Kernel, Launch, Params};
use crate::module::Module;

/// Addresses and strides of one layer's tensors, all in device memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layer {
    /// Q as the projection left it, \[B, S, H, D\] by its strides, in the spec's type.
    pub q: Tensor,
    /// K.
    pub k: Tensor,
    /// V.
    pub v: Tensor,
    /// Output. It may be the memory of q, k or v: those are read before attention writes.
    pub out: Tensor,
    /// QK-norm of video rows of Q; addresses of f32, 0 for ones and zeros.
    pub q_norm: NormWeights,
    /// QK-norm of video rows of K.
    pub k_norm: NormWeights,
    /// QK-norm of text rows of Q; the video's when not given.
    pub q_norm_text: Option<NormWeights>,
    /// QK-norm of text rows of K; the video's when not given.
    pub k_norm_text: Option<NormWeights>,
    /// RoPE cosines, f32, when the spec has RoPE: see [`PackParams::cos`].
    pub cos: u64,
    /// RoPE sines.
    pub sin: u64,
    /// Valid text tokens of each batch item, u32 \[B\], at most the spec's; 0 when all text is valid.
    pub text_lengths: u64,
    /// Natural log-sum-exp out, f32 \[B, H, S\]; 0 for none.
    pub lse: u64,
    /// Softmax scale; 1 / sqrt(head_dim) when not given. Q is multiplied by scale x log2(e) before it is rounded to the spec's type,
    /// so in f16 the product with the elements of Q should lie within its normal numbers, 2^-14 to 2^16.
    pub scale: Option<f32>,
}

/// Where the type of each head comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadTypes {
    /// Measured in this call.
    Profiled,
    /// Every head dense: what the schedule's warm-up asks for, see [`SparseAttention::head_types`].
    Dense,
    /// Address of u32 \[B, H\] in device memory, [`HeadType`] values: an earlier call's, or the embedder's.
    Given(u64),
}

/// What profiling found for one head.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct HeadProfile {
    /// Batch item.
    pub batch: u32,
    /// Head.
    pub head: u32,
    /// Mean squared error of the spatial mask over the sampled rows.
    pub spatial_error: f32,
    /// Mean squared error of the temporal mask.
    pub temporal_error: f32,
    /// "spatial" or "temporal".
    #[serde(serialize_with = "head_type_name")]
    pub head_type: HeadType,
}

fn head_type_name<S: serde::Serializer>(head: &HeadType, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(crate::name_of(*head))
}

/// The one piece of device memory that a layer needs besides its tensors. It may serve all layers of a model in turn.
pub struct Workspace {
    address: u64,
    bytes: u64,
    /// None for borrowed memory.
    owned: Option<Buffer>,
}

impl Workspace {
    /// Allocates.
    pub fn allocate(device: &Device, bytes: u64) -> Result<Workspace> {
        let buffer = device.allocate(bytes)?;
        Ok(Workspace { address: buffer.address(), bytes, owned: Some(buffer) })
    }

    /// Borrows `bytes` of device memory at `address`, a multiple of 256. It is checked at each call, and never freed.
    pub fn borrow(address: u64, bytes: u64) -> Workspace {
        Workspace { address, bytes, owned: None }
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The allocation, when it is this value's own.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.owned.as_ref()
    }
}

/// Sparse attention for a batch size and a number of heads.
pub struct SparseAttention {
    module: Arc<Module>,
    batch: u32,
    heads: u32,
    splits: u32,
    plan: Plan,
}

/// What a layer runs, in order: pack of all heads, profile, select, pack of temporal heads, attention.
pub(crate) type Steps = [Option<Launch>; 5];

impl SparseAttention {
    /// Plans for `batch` items of `heads` heads: any number up to the spec's, all of them when its QK-norm is over all heads.
    pub fn new(module: &Arc<Module>, batch: u32, heads: u32) -> Result<SparseAttention> {
        let spec = module.spec();
        check_heads(spec, heads as usize, "heads")?;
        let most = spec.most_launch_heads();
        if batch == 0 || u64::from(batch) * u64::from(heads) > u64::from(most) {
            let allowed = format!("1 or more, batch x heads at most {most}");
            return Err(Error::input("batch", batch, allowed, "Split the batch over several calls"));
        }
        let splits = profile_splits(spec, batch, heads, module.device().multiprocessors());
        let plan = spec.workspace(batch, heads, splits);
        Ok(SparseAttention { module: Arc::clone(module), batch, heads, splits, plan })
    }

    /// The module.
    pub fn module(&self) -> &Arc<Module> {
        &self.module
    }

    /// Bytes of the workspace.
    pub fn workspace_bytes(&self) -> u64 {
        self.plan.bytes
    }

    /// Where the parts lie in the workspace.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Dense for the calls that the spec's schedule keeps dense, else profiled.
    pub fn head_types(&self, step: u32, layer: u32) -> HeadTypes {
        if self.module.spec().schedule.is_dense(step, layer) { HeadTypes::Dense } else { HeadTypes::Profiled }
    }

    /// Launches one layer on `stream`: from Q, K and V to the output, without waiting for anything.
    ///
    /// # Errors
    /// Whatever is wrong with the arguments is said before anything is launched.
    ///
    /// # Safety
    /// Every address in `layer`, `types` and `workspace` is device memory (for the emulator: of this module's device) that holds
    /// what its documentation says for as long as the work runs, and nobody else writes it meanwhile. Two calls that may run at
    /// the same time have different workspaces.
    pub unsafe fn forward(&self, stream: Stream, layer: &Layer, types: HeadTypes, workspace: &Workspace) -> Result<()> {
        let steps = self.steps(layer, types, workspace)?;
        let device = self.module.device();
        steps.iter().flatten().try_for_each(|launch| device.launch(stream, self.module.loaded(), launch))
    }

    /// [`SparseAttention::forward`], waiting after each kernel: gives the milliseconds of each, in order.
    ///
    /// # Errors
    /// As for `forward`, and what the kernels themselves end with.
    ///
    /// # Safety
    /// As for `forward`.
    pub unsafe fn forward_timed(
        &self,
        stream: Stream,
        layer: &Layer,
        types: HeadTypes,
        workspace: &Workspace,
        mut before: impl FnMut(Kernel),
    ) -> Result<Vec<(Kernel, f64)>> {
        let steps = self.steps(layer, types, workspace)?;
        let device = self.module.device();
        let mut times = Vec::with_capacity(steps.len());
        for launch in steps.iter().flatten() {
            before(launch.kernel);
            times.push((launch.kernel, device.time(stream, || device.launch(stream, self.module.loaded(), launch))?));
        }
        Ok(times)
    }

    /// Errors and head types of the last profiled call in `workspace`, `[batch, heads]`, once its work is done.
    pub fn read_profile(&self, workspace: &Workspace) -> Result<Vec<HeadProfile>> {
        let words = |range: &Range<u64>| -> Result<Vec<[u8; 4]>> {
            let bytes = self.module.device().read_address(workspace.address + range.start, range.end - range.start)?;
            Ok(bytes.as_chunks().0.to_vec())
        };
        let (errors, types) = (words(&self.plan.errors)?, words(&self.plan.head_types)?);
        Ok(types
            .iter()
            .zip(errors.as_chunks::<2>().0)
            .zip(0..)
            .map(|((&head_type, &[spatial, temporal]), index)| HeadProfile {
                batch: index / self.heads,
                head: index % self.heads,
                spatial_error: f32::from_le_bytes(spatial),
                temporal_error: f32::from_le_bytes(temporal),
                head_type: HeadType::from_u32(u32::from_le_bytes(head_type)),
            })
            .collect())
    }

    /// Checks a call and writes its launches.
    pub(crate) fn steps(&self, layer: &Layer, types: HeadTypes, workspace: &Workspace) -> Result<Steps> {
        let spec = self.module.spec();
        let shape =
            Shape { batch: self.batch, rows: spec.layout.sequence(), heads: self.heads, head_dim: spec.head_dim };
        let scale = layer.scale.unwrap_or(1.0 / (spec.head_dim as f32).sqrt());
        check_call(spec, shape, layer, types, scale, workspace, &self.plan)?;

        let part = |range: &Range<u64>| workspace.address + range.start;
        let packed = [&self.plan.packed_q, &self.plan.packed_k, &self.plan.packed_v].map(part);
        let (batch, heads, splits) = (self.batch, self.heads, self.splits);
        let own_types = part(&self.plan.head_types);
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
                q_norm_text: layer.q_norm_text.unwrap_or(layer.q_norm),
                k_norm_text: layer.k_norm_text.unwrap_or(layer.k_norm),
                cos: layer.cos,
                sin: layer.sin,
                text_lengths: layer.text_lengths,
                head_types,
                packed_q: packed[0],
                packed_k: packed[1],
                packed_v: packed[2],
                schedule: part(&self.plan.schedule),
                batch,
                heads,
                scale_log2: scale * std::f32::consts::LOG2_E,
                pass: pass as u32,
                aligned: aligned.into(),
                reserved: 0,
            });
            let warps = pack_warps(spec.heads, spec.head_dim);
            self.launch(Kernel::Pack, [spec.layout.packed_rows() / warps, 3, batch], params)
        };
        let attention = || {
            let params = Params::Attention(AttentionParams {
                packed_q: packed[0],
                packed_k: packed[1],
                packed_v: packed[2],
                out: layer.out,
                lse: layer.lse,
                head_types: attention_types,
                text_lengths: layer.text_lengths,
                schedule: part(&self.plan.schedule),
                batch,
                heads,
                aligned: is_aligned(&layer.out, shape).into(),
                reserved: 0,
            });
            let items = u64::from(shape.rows.div_ceil(spec.tiles().query_rows)) * u64::from(batch * heads);
            let blocks = self.module.device().multiprocessors() * self.module.resources(Kernel::Attention).min_blocks;
            self.launch(Kernel::Attention, [items.min(blocks.into()) as u32, 1, 1], params)
        };
        let mut launches: Steps = [None; 5];
        launches[0] = Some(pack(PackPass::All, pack_types));
        if types == HeadTypes::Profiled {
            let (partials, errors) = (part(&self.plan.partials), part(&self.plan.errors));
            let profile = Params::Profile(ProfileParams {
                packed_q: packed[0],
                packed_k: packed[1],
                packed_v: packed[2],
                text_lengths: layer.text_lengths,
                partials,
                seed: spec.profile.seed,
                batch,
                heads,
                splits,
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
            let groups = spec.profile_plan(splits).groups;
            launches[1] = Some(self.launch(Kernel::Profile, [splits, groups, batch * heads], profile));
            launches[2] = Some(self.launch(Kernel::Select, [1, 1, batch * heads], select));
            launches[3] = Some(pack(PackPass::Temporal, own_types));
        }
        launches[4] = Some(attention());
        Ok(launches)
    }

    fn launch(&self, kernel: Kernel, grid: [u32; 3], params: Params) -> Launch {
        let resources = self.module.resources(kernel);
        Launch { kernel, grid, threads: resources.threads, shared_bytes: resources.shared_bytes, params }
    }
}

/// Extents of q, k, v and out.
#[derive(Clone, Copy)]
struct Shape {
    batch: u32,
    rows: u32,
    heads: u32,
    head_dim: u32,
}

/// Bytes of one element of q, k, v and out.
const ELEMENT: u64 = 2;

/// Bytes of the widest access of the kernels.
const WIDE: u64 = 16;

impl Shape {
    /// Extent and stride, in elements, of the three outer dimensions that have more than one index.
    fn dimensions(self, tensor: &Tensor) -> impl Iterator<Item = (u64, u64)> {
        [(self.batch, tensor.batch), (self.rows, tensor.row), (self.heads, tensor.head)]
            .into_iter()
            .filter(|&(extent, _)| extent > 1)
            .map(|(extent, stride)| (extent.into(), stride))
    }

    /// Byte range of a tensor, if it ends below 2^64.
    fn bytes(self, tensor: &Tensor) -> Option<Range<u64>> {
        let mut last = u64::from(self.head_dim) - 1;
        for (extent, stride) in self.dimensions(tensor) {
            last = last.checked_add((extent - 1).checked_mul(stride)?)?;
        }
        let bytes = last.checked_add(1)?.checked_mul(ELEMENT)?;
        Some(tensor.data..tensor.data.checked_add(bytes)?)
    }
}

/// Whether every row starts at a multiple of 16 bytes.
fn is_aligned(tensor: &Tensor, shape: Shape) -> bool {
    tensor.data.is_multiple_of(WIDE)
        && shape.dimensions(tensor).all(|(_, stride)| stride.is_multiple_of(WIDE / ELEMENT))
}

/// Everything that can be seen to be wrong with a call without looking at device memory.
fn check_call(
    spec: &Spec,
    shape: Shape,
    layer: &Layer,
    types: HeadTypes,
    scale: f32,
    workspace: &Workspace,
    plan: &Plan,
) -> Result<()> {
    let mut inputs = Vec::new();
    for (name, tensor) in [("q", &layer.q), ("k", &layer.k), ("v", &layer.v), ("out", &layer.out)] {
        check_address(name, tensor.data, ELEMENT)?;
        let Some(bytes) = shape.bytes(tensor) else {
            return Err(Error::input(
                format!("{name}, strides"),
                format!("{tensor:?}"),
                "a tensor that ends below 2^64",
                "Strides count elements, not bytes, and are not negative",
            ));
        };
        inputs.push((name, bytes));
    }
    let out = inputs.swap_remove(3).1;
    check_disjoint_rows(&layer.out, shape)?;
    let affine = [
        ("q_norm", Some(layer.q_norm)),
        ("k_norm", Some(layer.k_norm)),
        ("q_norm_text", layer.q_norm_text),
        ("k_norm_text", layer.k_norm_text),
    ];
    for (name, weights) in affine {
        let Some(weights) = weights else { continue };
        let kind = spec.qk_norm.as_ref().map(|norm| norm.kind);
        for (part, address, allowed) in
            [("weight", weights.weight, kind.is_some()), ("bias", weights.bias, kind == Some(NormKind::Layer))]
        {
            if address == 0 {
                continue;
            }
            if !allowed {
                return Err(Error::input(
                    format!("{name}.{part}"),
                    format!("address {address:#x}"),
                    format!("0: the QK-norm of spec {} has none", spec.name),
                    "Pass 0, or change [qk_norm] in the spec",
                ));
            }
            check_address(&format!("{name}.{part}"), address, WIDE)?;
        }
    }
    for (name, address) in [("cos", layer.cos), ("sin", layer.sin)] {
        match (spec.rope.is_some(), address) {
            (true, address) => check_address(name, address, WIDE)?,
            (false, 0) => {}
            (false, address) => {
                return Err(Error::input(
                    name,
                    format!("address {address:#x}"),
                    format!("0: spec {} has no RoPE", spec.name),
                    "Pass 0, or add [rope] to the spec",
                ));
            }
        }
    }
    let rows = u64::from(shape.batch) * u64::from(shape.heads) * u64::from(shape.rows);
    let words = |address: u64, count: u64| address..address.saturating_add(count * 4);
    let mut read_late = Vec::new();
    if layer.text_lengths != 0 {
        check_address("text_lengths", layer.text_lengths, 4)?;
        read_late.push(("text_lengths", words(layer.text_lengths, shape.batch.into())));
    }
    if let HeadTypes::Given(address) = types {
        check_address("head types", address, 4)?;
        read_late.push(("head types", words(address, u64::from(shape.batch) * u64::from(shape.heads))));
    }
    let mut written = vec![("out", out)];
    if layer.lse != 0 {
        check_address("lse", layer.lse, 4)?;
        written.push(("lse", words(layer.lse, rows)));
    }
    if !(scale.is_finite() && scale > 0.0) {
        return Err(Error::input("scale", scale, "a finite number above 0", "Leave it out for 1 / sqrt(head_dim)"));
    }
    if workspace.bytes < plan.bytes {
        return Err(Error::input(
            "workspace",
            format!("{} bytes", workspace.bytes),
            format!("at least {}", plan.bytes),
            "SparseAttention::workspace_bytes gives the size",
        ));
    }
    check_address("workspace", workspace.address, workspace::ALIGNMENT)?;
    // q, k and v are read before out is written, and so may share its memory. Nothing else may be written while it is needed.
    let workspace = ("workspace", workspace.address..workspace.address.saturating_add(plan.bytes));
    for (index, write) in written.iter().enumerate() {
        for other in written[..index].iter().chain(&read_late).chain([&workspace]) {
            check_apart(write, other)?;
        }
    }
    inputs.iter().try_for_each(|input| check_apart(&workspace, input))
}

fn check_address(name: &str, address: u64, alignment: u64) -> Result<()> {
    if address != 0 && address.is_multiple_of(alignment) {
        return Ok(());
    }
    let found = if address == 0 { "a null address".into() } else { format!("address {address:#x}") };
    Err(Error::input(
        name,
        found,
        format!("device memory at a multiple of {alignment} bytes"),
        "Pass the address of an allocation, or of an aligned part of one",
    ))
}

fn check_apart(a: &(&str, Range<u64>), b: &(&str, Range<u64>)) -> Result<()> {
    if a.1.end <= b.1.start || b.1.end <= a.1.start {
        return Ok(());
    }
    Err(Error::input(
        a.0,
        format!("{:#x} to {:#x}, which overlaps {} at {:#x} to {:#x}", a.1.start, a.1.end, b.0, b.1.start, b.1.end),
        "memory of its own",
        "Allocate the two apart",
    ))
}

/// No element of `out` may have two indices: with the dimensions in order of their strides, each must step over all before it.
fn check_disjoint_rows(out: &Tensor, shape: Shape) -> Result<()> {
    let mut dimensions: Vec<(u64, u64)> = shape.dimensions(out).collect();
    dimensions.sort_by_key(|&(_, stride)| stride);
    let mut extent = u64::from(shape.head_dim);
    for (count, stride) in dimensions {
        if stride < extent {
            return Err(Error::input(
                "out, strides",
                format!("batch {}, row {}, head {}", out.batch, out.row, out.head),
                format!(
                    "strides in elements that keep the {} rows apart",
                    u64::from(shape.rows) * u64::from(shape.heads)
                ),
                "Contiguous [B, S, H, D] has row = heads x head_dim, head = head_dim, batch = S x heads x head_dim",
            ));
        }
        extent += (count - 1) * stride;
    }
    Ok(())
}

/// Parts that profiling divides the keys of a head into, one a block, for `batch` items of `heads` heads on a GPU of so many
/// multiprocessors: what [`Spec::workspace`] asks for.
pub fn profile_splits(spec: &Spec, batch: u32, heads: u32, multiprocessors: u32) -> u32 {
    let key_tiles = spec.layout.sequence().div_ceil(PROFILE_KEY_ROWS);
    splits_of(batch * heads * spec.profile_plan(1).groups, multiprocessors, key_tiles.clamp(1, MOST_SPLITS))
}

/// A multiprocessor holds one block, so the time is the number of waves of blocks times the keys of a block: the fewest parts within
/// 5% of the best up to `most` are taken.
fn splits_of(blocks: u32, multiprocessors: u32, most: u32) -> u32 {
    let time = |splits: u32| f64::from((blocks * splits).div_ceil(multiprocessors)) / f64::from(splits);
    let best = (1..=most).map(time).fold(f64::INFINITY, f64::min);
    (1..=most).find(|&splits| time(splits) <= 1.05 * best).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::splits_of;

    #[test]
    fn splits_fill_whole_waves() {
        // (blocks of one split, multiprocessors, most) -> splits
        for (blocks, multiprocessors, most, splits) in
            [(24, 132, 32, 11), (96, 132, 16, 4), (132, 132, 32, 1), (1, 132, 32, 31), (24, 132, 3, 3), (4, 4, 19, 1)]
        {
            assert_eq!(splits_of(blocks, multiprocessors, most), splits, "{blocks} blocks");
        }
    }
}
