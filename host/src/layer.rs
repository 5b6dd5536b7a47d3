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

use framestride_shapes::launch::{NormWeights, ProfilePlan, Tensor};
use framestride_shapes::layout::HeadType;
use framestride_shapes::workspace::WorkspacePlan;

use crate::call::check_heads;
use crate::device::Stream;
use crate::error::{Error, Result};
use crate::launch::Launch;
use crate::module::Module;
use crate::plan::profile_splits;
use crate::workspace::Workspace;

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
    /// RoPE cosines, f32, when the spec has RoPE: see [`PackParams::cos`](framestride_shapes::launch::PackParams::cos).
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
#[derive(Clone, Copy, Debug, PartialEq)]
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
    pub head_type: HeadType,
}

/// Sparse attention for a batch size and a number of heads.
pub struct SparseAttention {
    pub(crate) module: Arc<Module>,
    pub(crate) batch: u32,
    pub(crate) heads: u32,
    /// Parts that profiling divides the keys of a head into.
    pub(crate) splits: u32,
    pub(crate) plan: WorkspacePlan,
}

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
    pub fn plan(&self) -> &WorkspacePlan {
        &self.plan
    }

    /// How the partial results of profiling lie in their part.
    pub fn profile_plan(&self) -> ProfilePlan {
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
        let launches = self.launches(layer, types, workspace)?;
        // SAFETY: the workspace is memory of this device (checked in `launches`), and the rest is the caller's promise.
        launches.in_order().try_for_each(|launch| unsafe { self.launch(stream, launch) })
    }

    /// Launches one kernel of a layer, as [`SparseAttention::launches`] wrote it.
    ///
    /// # Safety
    /// As for [`SparseAttention::forward`], for the layer and the workspace that `launch` was written for. The launches before it
    /// in the layer's order have been launched on the same stream.
    pub unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.module.device().launch(stream, self.module.loaded(), launch) }
    }

    /// Errors and head types of the last profiled call in `workspace`, `[batch, heads]`, once its work is done.
    pub fn read_profile(&self, workspace: &Workspace) -> Result<Vec<HeadProfile>> {
        let device = self.module.device();
        workspace.check(device, &self.plan)?;
        let words = |range: &Range<u64>| -> Result<Vec<[u8; 4]>> {
            // SAFETY: the range lies in the workspace, which is memory of this device (checked above).
            let bytes = unsafe { device.read_address(workspace.address() + range.start, range.end - range.start)? };
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
}
