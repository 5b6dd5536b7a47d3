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
    AttentionParams, MOST_SPLITS, NormWeights, PROFILE_KEY_ROWS, PackParams, PackPass, ProfileParams, ProfilePlan,
    SelectParams, Tensor, pack_warps,
};
use framestride_shapes::layout::HeadType;
use framestride_shapes::spec::{Dtype, NormKind, NormOver, Spec};
use framestride_shapes::workspace::{self, Workspace as Plan};

use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::inputs::{RopeTables, check_heads};
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
    /// so in f16 the product with the elements of Q should lie within its normal numbers, 2^-14 to 2^16. Allowed are scales with
    /// which rows of Q and K of root mean square 1 stay finite.
    pub scale: Option<f32>,
}

/// Where the type of each head comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadTypes {
    /// Measured in this call.
    Profiled,
    /// Every head dense: what the schedule's warm-up asks for, see [`SparseAttention::head_types`].
    Dense,
    /// Address of u32 \[B, H\] in device memory, [`HeadType`] values: the embedder's, or those of an earlier call in the same
    /// workspace, at `head_types` of its [`SparseAttention::plan`].
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
    device: Device,
    address: u64,
    bytes: u64,
    /// None for borrowed memory.
    owned: Option<Buffer>,
}

impl Workspace {
    /// Allocates.
    pub fn allocate(device: &Device, bytes: u64) -> Result<Workspace> {
        let buffer = device.allocate(bytes)?;
        Ok(Workspace { device: device.clone(), address: buffer.address(), bytes, owned: Some(buffer) })
    }

    /// Borrows `bytes` of memory of `device` at `address`, a multiple of 256. Size and alignment are checked at each call; the
    /// memory is never freed.
    ///
    /// # Safety
    /// The range is memory of `device` for as long as this value lives, and holds nothing that anybody else needs.
    pub unsafe fn borrow(device: &Device, address: u64, bytes: u64) -> Workspace {
        Workspace { device: device.clone(), address, bytes, owned: None }
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

    /// How the partial results of profiling lie in their part.
    pub(crate) fn profile_plan(&self) -> ProfilePlan {
        self.module.spec().profile_plan(self.splits)
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
    /// Every address in `layer` and `types` is memory of this module's device that holds what its documentation says for as long as
    /// the work runs, and nobody else writes it or the workspace meanwhile: so two calls that may run at the same time have
    /// different workspaces. This value and `workspace` outlive the work.
    pub unsafe fn forward(&self, stream: Stream, layer: &Layer, types: HeadTypes, workspace: &Workspace) -> Result<()> {
        let steps = self.steps(layer, types, workspace)?;
        let device = self.module.device();
        // SAFETY: the workspace is memory of this device (checked above), and the rest is the caller's promise.
        steps.iter().flatten().try_for_each(|launch| unsafe { device.launch(stream, self.module.loaded(), launch) })
    }

    /// [`SparseAttention::forward`], waiting after each kernel: gives the milliseconds of each, in order. `before` hears of each
    /// kernel before it is launched.
    ///
    /// # Errors
    /// As for `forward`, what the kernels themselves end with, and `before`'s.
    ///
    /// # Safety
    /// As for `forward`.
    pub unsafe fn forward_timed(
        &self,
        stream: Stream,
        layer: &Layer,
        types: HeadTypes,
        workspace: &Workspace,
        mut before: impl FnMut(Kernel) -> Result<()>,
    ) -> Result<Vec<(Kernel, f64)>> {
        let steps = self.steps(layer, types, workspace)?;
        let device = self.module.device();
        let mut times = Vec::with_capacity(steps.len());
        for launch in steps.iter().flatten() {
            before(launch.kernel)?;
            // SAFETY: as in `forward`.
            let work = || unsafe { device.launch(stream, self.module.loaded(), launch) };
            times.push((launch.kernel, device.time(stream, work)?));
        }
        Ok(times)
    }

    /// Errors and head types of the last profiled call in `workspace`, `[batch, heads]`, once its work is done.
    pub fn read_profile(&self, workspace: &Workspace) -> Result<Vec<HeadProfile>> {
        let device = self.module.device();
        check_workspace(device, &self.plan, workspace)?;
        let words = |range: &Range<u64>| -> Result<Vec<[u8; 4]>> {
            // SAFETY: the range lies in the workspace, which is memory of this device (checked above).
            let bytes = unsafe { device.read_address(workspace.address + range.start, range.end - range.start)? };
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
        check_scale(spec, scale)?;
        check_workspace(self.module.device(), &self.plan, workspace)?;
        check_call(spec, shape, layer, types, workspace.address, &self.plan)?;

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
            let min_blocks = self.module.resources(Kernel::Attention).min_blocks;
            let blocks = u64::from(self.module.device().multiprocessors()) * u64::from(min_blocks);
            self.launch(Kernel::Attention, [items.min(blocks) as u32, 1, 1], params)
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

/// What lies where in device memory.
type Region = (String, Range<u64>);

/// Everything that can be seen to be wrong with a call without looking at device memory, but for scale and workspace.
fn check_call(spec: &Spec, shape: Shape, layer: &Layer, types: HeadTypes, workspace: u64, plan: &Plan) -> Result<()> {
    let tensor = |name: &str, tensor: &Tensor| -> Result<Region> {
        check_address(name, tensor.data, ELEMENT)?;
        let bytes = shape.bytes(tensor).ok_or_else(|| {
            Error::input(
                format!("{name}, strides"),
                format!("{tensor:?}"),
                "a tensor that ends below 2^64",
                "Strides count elements, not bytes, and are not negative",
            )
        })?;
        Ok((name.to_owned(), bytes))
    };
    let projections = [tensor("q", &layer.q)?, tensor("k", &layer.k)?, tensor("v", &layer.v)?];
    let out = tensor("out", &layer.out)?;
    check_disjoint_rows(&layer.out, shape)?;

    // What is read besides Q, K and V.
    let mut read = Vec::new();
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
            let over_heads = spec.qk_norm.as_ref().is_some_and(|norm| norm.over == NormOver::Heads);
            let heads = if over_heads { shape.heads } else { 1 };
            let words = u64::from(heads) * u64::from(shape.head_dim);
            read.push(words_at(&format!("{name}.{part}"), address, WIDE, words)?);
        }
    }
    let table = RopeTables::shape(spec, shape.heads as usize).into_iter().map(|extent| extent as u64).product();
    for (name, address) in [("cos", layer.cos), ("sin", layer.sin)] {
        match (spec.rope.is_some(), address) {
            (true, address) => read.push(words_at(name, address, WIDE, table)?),
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
    let all_heads = u64::from(shape.batch) * u64::from(shape.heads);
    if layer.text_lengths != 0 {
        read.push(words_at("text_lengths", layer.text_lengths, 4, shape.batch.into())?);
    }
    if let HeadTypes::Given(address) = types {
        // Those that an earlier call left in the workspace stay there.
        if address != workspace + plan.head_types.start {
            read.push(words_at("head types", address, 4, all_heads)?);
        }
    }
    let lse = match layer.lse {
        0 => None,
        address => Some(words_at("lse", address, 4, all_heads * u64::from(shape.rows))?),
    };

    // Q, K and V are read before out is written, and so may share its memory. Nothing else that is written may be anything else's.
    let workspace = ("workspace".to_owned(), workspace..workspace + plan.bytes);
    for region in read.iter().chain(&projections).chain([&out]).chain(&lse) {
        check_apart(region, &workspace)?;
    }
    for region in read.iter().chain(&lse) {
        check_apart(region, &out)?;
    }
    match &lse {
        Some(lse) => read.iter().chain(&projections).try_for_each(|region| check_apart(region, lse)),
        None => Ok(()),
    }
}

/// Checks a softmax scale: see [`Layer::scale`]. An element of a row of root mean square 1 is at most sqrt(head_dim), and the product
/// of two such rows at most head_dim. Below its normal numbers f32 arithmetic here has only zero.
pub(crate) fn check_scale(spec: &Spec, scale: f32) -> Result<()> {
    let largest = match spec.dtype {
        Dtype::Bf16 => half::bf16::MAX.to_f32(),
        Dtype::F16 => half::f16::MAX.to_f32(),
    };
    let (log2_e, head_dim) = (std::f32::consts::LOG2_E, spec.head_dim as f32);
    let most = (largest / head_dim.sqrt()).min(f32::MAX / head_dim) / log2_e;
    // Its product with log2(e), which is above 1, is normal too.
    let least = f32::MIN_POSITIVE;
    // NaN lies in no range.
    if (least..=most).contains(&scale) {
        return Ok(());
    }
    Err(Error::input(
        "scale",
        format!("{scale:e}"),
        format!("{least:.1e} to {most:.1e} in {} with head_dim {head_dim}", spec.dtype.as_str()),
        "Leave it out for 1 / sqrt(head_dim)",
    ))
}

/// Whether a workspace is memory of the device, and holds the plan.
fn check_workspace(device: &Device, plan: &Plan, workspace: &Workspace) -> Result<()> {
    if !workspace.device.is(device) {
        return Err(Error::input(
            "workspace",
            format!("memory of another device ({})", workspace.device.name()),
            format!("memory of the module's device ({})", device.name()),
            "Allocate it on the device that the module was loaded on",
        ));
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
    range_at("workspace", workspace.address, plan.bytes).map(drop)
}

/// The bytes of `words` 4-byte words at an aligned address.
fn words_at(name: &str, address: u64, alignment: u64, words: u64) -> Result<Region> {
    check_address(name, address, alignment)?;
    Ok((name.to_owned(), range_at(name, address, words * 4)?))
}

/// `bytes` bytes from an address.
fn range_at(name: &str, address: u64, bytes: u64) -> Result<Range<u64>> {
    let end = address.checked_add(bytes).ok_or_else(|| {
        Error::input(
            name,
            format!("{bytes} bytes at {address:#x}"),
            "memory that ends below 2^64",
            "Pass the address of an allocation",
        )
    })?;
    Ok(address..end)
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

fn check_apart(a: &Region, b: &Region) -> Result<()> {
    if a.1.end <= b.1.start || b.1.end <= a.1.start {
        return Ok(());
    }
    Err(Error::input(
        &a.0,
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
    let blocks = u64::from(batch) * u64::from(heads) * u64::from(spec.profile_plan(1).groups);
    splits_of(blocks, multiprocessors.max(1), key_tiles.clamp(1, MOST_SPLITS))
}

/// A multiprocessor holds one block, so the time is the number of waves of blocks times the keys of a block: the fewest parts within
/// 5% of the best up to `most` are taken.
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
        // (blocks of one split, multiprocessors, most) -> splits
        for (blocks, multiprocessors, most, splits) in
            [(24, 132, 32, 11), (96, 132, 16, 4), (132, 132, 32, 1), (1, 132, 32, 31), (24, 132, 3, 3), (4, 4, 19, 1)]
        {
            assert_eq!(splits_of(blocks, multiprocessors, most), splits, "{blocks} blocks");
        }
    }
}
