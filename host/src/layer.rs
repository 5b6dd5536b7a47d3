//! Sparse attention of one layer: [`SparseAttention::forward`].
//!
//! ```text
//! head types  launches
//! Profiled    pack(K, V, sampled rows of Q) -> profile -> select -> pack(Q, temporal K and V) -> attention
//! Given       pack(all, by type) -> attention
//! Dense       pack(all, spatial layout) -> attention
//! ```
//!
//! Where all heads multiply in 8 bits, `pack -> profile` runs twice, for half of the keys each. So
//! the images of profiling take no more memory than those of attention.
//!
//! Where the spec says `compute = "e4m3"`, heads multiply in 8 bits. What follows **select** is
//!
//! ```text
//! in_8_bits(heads) = center -> pack_e4m3 -> pack_values -> attention_e4m3
//! ```
//!
//! of all heads. With `[precision]` the spec has a bound of their errors, and it is
//!
//! ```text
//! precisions given   in_8_bits(heads with 8) -> pack(heads with 16) -> attention(heads with 16)
//! Profiled           in_8_bits(all) -> judge -> pack(heads with 16) -> attention(heads with 16)
//! Given, Dense       pack(all) -> attention
//! ```
//!
//! The last row keeps the bound where nothing is known of the heads.
//!
//! Everything is checked before the first launch, and nothing is allocated or waited for. So a
//! whole layer can be captured in a CUDA graph. What profiling found goes where [`Layer::found`]
//! says, or stays in the workspace ([`SparseAttention::read_profile`]).

use std::ops::Range;
use std::sync::Arc;

use framestride_shapes::dtype::Compute;
use framestride_shapes::layout::HeadType;
use framestride_shapes::params::{NormWeights, PartialsLayout, Tensor};
use framestride_shapes::workspace::WorkspaceLayout;

use crate::call::check_heads;
use crate::device::Stream;
use crate::error::{Error, Result};
use crate::launch::Launch;
use crate::module::Module;
use crate::plan::profile_splits;
use crate::workspace::Workspace;

/// Addresses and strides of one layer's tensors. All of them lie in device memory.
///
/// Strides count elements. Addresses and strides of Q, K, V and the output may be any multiples of
/// 2 bytes; multiples of 16 bytes are faster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layer {
    /// Q as the projection left it, neither normalised nor rotated: \[B, S, H, D\] by its strides,
    /// in the spec's type. Rows of text that has [tensors of its own](Text::qkv) are not among
    /// these.
    pub q: Tensor,
    /// K, likewise.
    pub k: Tensor,
    /// V, likewise.
    pub v: Tensor,
    /// The output, of the same shape and type. It may be the memory of q, k or v, which are read
    /// before attention writes. But not where heads of one call may multiply in 8 bits and in 16:
    /// those in 16 are read when the others are written.
    pub out: Tensor,
    /// QK-norm of video rows of Q: addresses of f32. 0 stands for weights of one and biases of
    /// zero.
    pub q_norm: NormWeights,
    /// QK-norm of video rows of K, likewise.
    pub k_norm: NormWeights,
    /// The text before the video.
    pub before: Text,
    /// The text after the video.
    pub after: Text,
    /// Address of the RoPE cosines when the spec has RoPE: f32 of the shape
    /// [`Spec::rope_table_shape`](framestride_shapes::spec::Spec::rope_table_shape), contiguous. A
    /// table may go on behind these rows: nothing reads what follows.
    pub cos: u64,
    /// Address of the RoPE sines, likewise.
    pub sin: u64,
    /// Elements from one batch item's cosines to the next item's, and likewise of the sines. It is
    /// a multiple of 4. With 0, all items share one table.
    ///
    /// Items may be different parts of one long table. So prompts of different lengths, which shift
    /// the positions of the video, need no tables of their own.
    pub rope_batch: u64,
    /// Address where the natural log-sum-exp of each row is written, f32 \[B, H, S\]. 0 asks for
    /// none.
    pub lse: u64,
    /// Where a call that profiles writes what it finds.
    pub found: Found,
    /// Address of the precisions of the heads, u32 \[B, H\], for a spec with `[precision]`: a head
    /// with 8 multiplies in 8 bits, every other one in 16, the type of the tensors.
    ///
    /// With 0, a call that profiles finds them. It computes all heads in 8 bits, and again in 16
    /// those whose error is above the bound. Any other call computes all heads in 16 bits.
    ///
    /// They may be those that an earlier call found, in other memory or in the same workspace, at
    /// `precisions` of its [`SparseAttention::workspace_layout`].
    pub precisions: u64,
    /// Half widths of the spatial and the temporal band in tokens, 1 to N. Without them, the spec's
    /// are taken. [`half_width_of_density`](framestride_shapes::density::half_width_of_density)
    /// makes them of densities. They may differ between calls.
    pub half_widths: Option<[u32; HeadType::CANDIDATES.len()]>,
    /// Softmax scale. Without it, 1 / sqrt(head_dim) is taken.
    ///
    /// Q is multiplied by scale x log2(e) before it is rounded to the spec's type. So in f16 the
    /// products with the elements of Q should be normal numbers, 2^-14 to 2^16. A scale is allowed
    /// if rows of Q and K of root mean square 1 stay finite with it.
    pub scale: Option<f32>,
    /// Seed of the draw of the rows that profiling samples. Without it, the spec's is taken.
    ///
    /// With another seed for each step and layer, other rows are looked at. A CUDA graph keeps the
    /// seed with which it was captured.
    pub seed: Option<u64>,
}

/// Where profiling writes what it finds. 0 stands for the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    /// Address for the types of the heads, u32 \[B, H\] with the values of [`HeadType`].
    pub head_types: u64,
    /// Address for the mean squared errors of [`HeadType::CANDIDATES`], f32 \[B, H, 2\].
    pub errors: u64,
    /// Address for the precisions of the heads, u32 \[B, H\], 8 or 16. A call finds them that
    /// profiles for a spec with `[precision]`, and to which none are given.
    pub precisions: u64,
    /// Address for their errors, f32 \[B, H\] ([`HeadPrecision::error`]), likewise.
    pub precision_errors: u64,
}

/// The text on one side of the video.
#[derive(Clone, Copy, Debug, Default)]
pub struct Text {
    /// Q, K and V of these rows as tensors of their own: \[B, tokens, H, D\] by their strides. So a
    /// model that projects text and video apart need not join them.
    ///
    /// Without them, the rows lie in `q`, `k` and `v` of the [`Layer`], before the video or after
    /// it.
    pub qkv: Option<[Tensor; 3]>,
    /// Address of the numbers of valid tokens, u32 \[B\]. Valid ones come first. 0 means that all
    /// are valid.
    pub lengths: u64,
    /// QK-norm of these rows of Q. Without it, they get the norm of video rows.
    pub q_norm: Option<NormWeights>,
    /// QK-norm of these rows of K, likewise.
    pub k_norm: Option<NormWeights>,
}

/// Where the type of each head comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeadTypes {
    /// This call profiles the heads, and takes what it finds.
    Profiled,
    /// Every head is dense. A model's schedule asks for it in its warm-up
    /// ([`SparseAttention::head_types`]).
    Dense,
    /// The caller gives the types: the address of u32 \[B, H\] in device memory, with the values of
    /// [`HeadType`].
    ///
    /// They may be those that an earlier call left in the same workspace, at `head_types` of its
    /// [`SparseAttention::workspace_layout`].
    Given(u64),
}

/// What profiling found for one head.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct HeadProfile {
    /// Number of the batch item.
    pub batch: u32,
    /// Number of the head.
    pub head: u32,
    /// The mean squared error over the sampled rows of each of [`HeadType::CANDIDATES`].
    pub errors: [f32; HeadType::CANDIDATES.len()],
    /// The candidate with the lowest error.
    pub head_type: HeadType,
    /// In which precision it multiplies. There is none for a spec without `[precision]`.
    pub precision: Option<HeadPrecision>,
}

/// In which precision a head multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct HeadPrecision {
    /// What 8 bits change of its sampled rows: the norm of the difference to 16 bits over the norm
    /// in 16 bits, under the mask of its type. It is NaN where that is no number.
    pub error: f32,
    /// [`Compute::E4m3`] where the error is within the bound.
    pub compute: Compute,
}

/// Sparse attention of a layer, for a batch size and a number of heads.
pub struct SparseAttention {
    pub(crate) module: Arc<Module>,
    pub(crate) batch: u32,
    pub(crate) heads: u32,
    /// Into how many parts profiling divides the keys of a head.
    pub(crate) splits: u32,
    pub(crate) workspace: WorkspaceLayout,
}

impl SparseAttention {
    /// Plans a layer for `batch` items of `heads` heads.
    ///
    /// They may be some of the model's, or more than the spec has: heads know nothing of each
    /// other. But a QK-norm over all heads needs exactly the spec's. Pack is planned for as many as
    /// the spec has.
    ///
    /// # Errors
    /// An [`Error::Input`] for a batch or a number of heads that no launch can have
    /// ([`Spec::most_launch_heads`](framestride_shapes::spec::Spec::most_launch_heads)).
    pub fn new(module: &Arc<Module>, batch: u32, heads: u32) -> Result<SparseAttention> {
        let spec = module.spec();
        check_heads(spec, heads as usize, "heads")?;
        let most = spec.most_launch_heads();
        if batch == 0 || u64::from(batch) * u64::from(heads) > u64::from(most) {
            let allowed = format!("1 or more, batch x heads at most {most}");
            let mend = if batch == 0 { "Give at least one item" } else { "Split the batch over several calls" };
            return Err(Error::input("batch", batch, allowed, mend));
        }
        let splits = profile_splits(spec, module.arch(), batch, heads, module.device().multiprocessors());
        let workspace = spec.workspace(batch, heads, splits);
        Ok(SparseAttention { module: Arc::clone(module), batch, heads, splits, workspace })
    }

    /// The module with the kernels.
    #[must_use]
    pub fn module(&self) -> &Arc<Module> {
        &self.module
    }

    /// Bytes that the workspace must have.
    #[must_use]
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace.bytes
    }

    /// Where everything lies in the workspace.
    #[must_use]
    pub fn workspace_layout(&self) -> &WorkspaceLayout {
        &self.workspace
    }

    /// How the partial results of profiling lie in their part of the workspace.
    #[doc(hidden)]
    #[must_use]
    pub fn partials(&self) -> PartialsLayout {
        self.module.spec().partials(self.splits)
    }

    /// The types that the spec's schedule asks for: dense during its warm-up, else profiled. Steps
    /// and layers count from 0.
    #[must_use]
    pub fn head_types(&self, step: u32, layer: u32) -> HeadTypes {
        if self.module.spec().schedule.is_dense(step, layer) { HeadTypes::Dense } else { HeadTypes::Profiled }
    }

    /// Launches one layer on `stream`, from Q, K and V to the output. It waits for nothing.
    ///
    /// # Errors
    /// An [`Error::Input`] for whatever is wrong with the arguments; then nothing was launched.
    /// [`Error::Driver`] or [`Error::Emulator`] when a launch fails.
    ///
    /// # Safety
    /// Every address in `layer` and `types` is memory of this module's device. It holds what its
    /// documentation says for as long as the work runs. Nobody else writes it or the workspace
    /// meanwhile: two calls that may run at the same time have different workspaces. This value and
    /// `workspace` outlive the work.
    pub unsafe fn forward(&self, stream: Stream, layer: &Layer, types: HeadTypes, workspace: &Workspace) -> Result<()> {
        let launches = self.launches(layer, types, workspace)?;
        // SAFETY: the workspace is memory of this device (checked in `launches`), and the rest is
        // the caller's promise.
        launches.in_order().try_for_each(|launch| unsafe { self.launch(stream, launch) })
    }

    /// Launches what finds the types of the heads, and no attention. What it finds goes where
    /// [`Layer::found`] says. `out` and `lse` of the layer are not looked at.
    ///
    /// # Errors
    /// As for [`SparseAttention::forward`].
    ///
    /// # Safety
    /// As for [`SparseAttention::forward`].
    pub unsafe fn profile(&self, stream: Stream, layer: &Layer, workspace: &Workspace) -> Result<()> {
        // SAFETY: as in `forward`.
        self.profile_launches(layer, workspace)?
            .in_order()
            .try_for_each(|launch| unsafe { self.launch(stream, launch) })
    }

    /// Launches one kernel of a layer, as [`SparseAttention::launches`] wrote it.
    ///
    /// # Safety
    /// This value wrote `launch`. Its layer and workspace are as [`SparseAttention::forward`] asks
    /// for. The launches before it in the layer's order have been launched on the same stream.
    pub unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.module.device().launch(stream, self.module.loaded(), launch) }
    }

    /// Reads what the last profiled call in `workspace` found, for `[batch, heads]`, where
    /// [`Layer::found`] named no other place. Precisions are those of the last call that found any.
    /// It waits for all work of the device.
    ///
    /// # Errors
    /// An [`Error::Input`] when `workspace` is too small, or memory of another device.
    pub fn read_profile(&self, workspace: &Workspace) -> Result<Vec<HeadProfile>> {
        let device = self.module.device();
        workspace.check(device, &self.workspace)?;
        let words = |range: &Range<u64>| -> Result<Vec<[u8; 4]>> {
            // SAFETY: the range lies in the workspace, which is memory of this device (checked
            // above).
            let bytes = unsafe { device.read_address(workspace.address() + range.start, range.end - range.start)? };
            Ok(bytes.as_chunks().0.to_vec())
        };
        let (errors, types) = (words(&self.workspace.errors)?, words(&self.workspace.head_types)?);
        let precisions = match self.module.spec().largest_error {
            None => Vec::new(),
            Some(_) => {
                words(&self.workspace.precision_errors)?.into_iter().zip(words(&self.workspace.precisions)?).collect()
            }
        };
        let precision = |&(error, bits): &([u8; 4], [u8; 4])| HeadPrecision {
            error: f32::from_le_bytes(error),
            compute: Compute::of_bits(u32::from_le_bytes(bits)),
        };
        Ok(types
            .iter()
            .zip(errors.as_chunks::<{ HeadType::CANDIDATES.len() }>().0)
            .zip(0..)
            .map(|((&head_type, &errors), index)| HeadProfile {
                batch: index / self.heads,
                head: index % self.heads,
                errors: errors.map(f32::from_le_bytes),
                head_type: HeadType::from_u32(u32::from_le_bytes(head_type)),
                precision: precisions.get(index as usize).map(precision),
            })
            .collect())
    }
}
