//! Sparse attention of a layer as a candle op: [`Attention`].

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape, Tensor};
use framestride::{Module, Spec};

use crate::call::{Call, Launched, Made, own, refused};
use crate::place::Place;

/// Sparse attention of Q, K and V, with the kernels of one spec on one device.
///
/// Q, K and V are \[B, S, H, D\] as the projections left them, neither normalised nor rotated, in
/// the spec's type. They may have any strides and offset, but the elements of a row are contiguous;
/// so parts of one packed tensor and `transpose(1, 2)` of \[B, H, S, D\] need no copy. The output
/// is contiguous, \[B, S, H, D\]. B is any number, and so is H, unless the spec has a QK-norm over
/// all heads. Q, K and V have no rows of a side of the text that has tensors of its own
/// ([`Text::qkv`]); the output has them all.
///
/// The fields say what else a call is given. A clone shares the kernels, so each layer of a model
/// may have one with weights of its own.
///
/// It has no gradient: a backward pass is refused.
#[derive(Clone)]
pub struct Attention {
    /// QK-norm of video rows of Q.
    pub q_norm: Norm,
    /// QK-norm of video rows of K.
    pub k_norm: Norm,
    /// The tables of RoPE, when the spec has it.
    pub rope: Option<Rope>,
    /// The text before the video.
    pub before: Text,
    /// The text after the video.
    pub after: Text,
    /// Where the type of each head comes from.
    pub head_types: HeadTypes,
    /// In how many bits each head multiplies, u32 \[B, H\], for a spec with `[precision]`: 8, or
    /// any other number for those of the tensors. [`Output::precisions`] of an earlier call may be
    /// given, so that no head is computed twice. Without them, a call that profiles finds them, and
    /// any other one computes all heads in 16 bits.
    pub precisions: Option<Tensor>,
    /// Half widths of the spatial and the temporal band in tokens, 1 to N. Without them, the spec's
    /// are taken.
    pub half_widths: Option<[u32; 2]>,
    /// Softmax scale. Without it, 1 / sqrt(D) is taken.
    pub scale: Option<f32>,
    /// Seed of the draw of the rows that profiling samples. Without it, the spec's is taken.
    pub seed: Option<u64>,
    pub(crate) kernels: Arc<Kernels>,
}

/// The affine part of a QK-norm, f32. It is \[D\], or \[H D\] when the norm is over all heads.
#[derive(Clone, Default)]
pub struct Norm {
    /// The weight. Without it, it is ones.
    pub weight: Option<Tensor>,
    /// The bias of a layer norm. Without it, it is zeros.
    pub bias: Option<Tensor>,
}

/// The tables of RoPE, f32: the shape that `Spec::rope_table_shape` gives, \[rows, channels / 2\]
/// or \[rows, H, channels / 2\]. With a leading dimension B, each batch item has tables of its own.
#[derive(Clone)]
pub struct Rope {
    /// The cosines.
    pub cos: Tensor,
    /// The sines.
    pub sin: Tensor,
}

/// The text on one side of the video.
#[derive(Clone, Default)]
pub struct Text {
    /// Q, K and V of these rows as tensors of their own, \[B, tokens, H, D\]. Without them, the
    /// rows lie in the Q, K and V of the call, before the video or after it.
    pub qkv: Option<[Tensor; 3]>,
    /// Numbers of valid tokens, u32 \[B\]. Valid ones come first. Without them, all are valid.
    pub lengths: Option<Tensor>,
    /// QK-norm of these rows of Q. Without it, they get the norm of video rows.
    pub q_norm: Option<Norm>,
    /// QK-norm of these rows of K, likewise.
    pub k_norm: Option<Norm>,
}

/// Where the type of each head comes from.
#[derive(Clone)]
pub enum HeadTypes {
    /// The call profiles the heads, and takes what it finds.
    Profiled,
    /// Every head is dense.
    Dense,
    /// The caller gives the types, u32 \[B, H\]: 0 is dense, 1 spatial, 2 temporal.
    /// [`Output::head_types`] of an earlier call may be given.
    Given(Tensor),
}

/// What a call can tell.
pub struct Output {
    /// The output, \[B, S, H, D\].
    pub out: Tensor,
    /// The natural log-sum-exp of each row, f32 \[B, H, S\].
    pub lse: Tensor,
    /// The types that profiling found, u32 \[B, H\]: 1 is spatial, 2 temporal. Only a profiled call
    /// has them.
    pub head_types: Option<Tensor>,
    /// The mean squared errors of the spatial and the temporal mask over the sampled rows, f32
    /// \[B, H, 2\], likewise.
    pub errors: Option<Tensor>,
    /// The bits in which the heads multiplied, u32 \[B, H\]: 8 or 16. Only a profiled call of a
    /// spec with `[precision]` has them, to which none were given.
    pub precisions: Option<Tensor>,
    /// What 8 bits change of the sampled rows, f32 \[B, H\], likewise: the norm of the difference
    /// to 16 bits over the norm in 16 bits.
    pub precision_errors: Option<Tensor>,
}

/// The kernels of one spec in the context of a candle device.
pub(crate) struct Kernels {
    /// The fields are dropped in this order, the context last.
    pub module: Arc<Module>,
    pub device: Device,
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // Kernels that still run must not be unloaded. A failure has nobody to be told to.
        let _ = self.module.device().synchronize();
    }
}

impl Attention {
    /// Loads the kernels of a spec on a device. It takes a second or two the first time, when the
    /// driver compiles them, and milliseconds after that.
    ///
    /// With the feature `emulator`, the CPU is a device too.
    ///
    /// # Errors
    /// An error that says what is missing when the device does not run the kernels.
    pub fn load(device: &Device, spec: &Spec) -> Result<Attention> {
        let module = Module::load(&device_of(device)?, spec).map_err(Error::wrap)?;
        Ok(Attention {
            q_norm: Norm::default(),
            k_norm: Norm::default(),
            rope: None,
            before: Text::default(),
            after: Text::default(),
            head_types: HeadTypes::Profiled,
            precisions: None,
            half_widths: None,
            scale: None,
            seed: None,
            kernels: Arc::new(Kernels { module, device: device.clone() }),
        })
    }

    /// The spec.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        self.kernels.module.spec()
    }

    /// Attention of Q, K and V. It launches on the stream of Q's device, and waits for nothing.
    ///
    /// # Errors
    /// An error that says what was found, what is allowed and how to mend it; then nothing was
    /// launched. Or the driver's, when a launch fails.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3(k, v, self.clone())
    }

    /// [`Attention::forward`], with the log-sum-exp of each row and what profiling found.
    ///
    /// # Errors
    /// As for [`Attention::forward`]. Tensors of which candle keeps the gradient are refused.
    pub fn forward_with_output(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Output> {
        if [q, k, v].iter().any(|tensor| tensor.track_op()) {
            return Err(Error::BackwardNotSupported { op: self.name() }.bt());
        }
        match q.device() {
            Device::Cpu => self.output(&CpuDevice, [("q", q), ("k", k), ("v", v)]),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => self.output(device, [("q", q), ("k", k), ("v", v)]),
            device => no_kernels(device),
        }
    }

    fn output<P: Place>(&self, place: &P, qkv: [(&str, &Tensor); 3]) -> Result<Output> {
        let locked = qkv.map(|(name, tensor)| (name, tensor.storage_and_layout()));
        let [q, k, v] = locked.each_ref().map(|(name, (storage, layout))| (own(place, name, storage), *layout));
        let Launched { out, lse, found, judged } =
            Call::new(self, place).launch([(q.0?, q.1), (k.0?, k.1), (v.0?, v.1)])?;
        let tensor =
            |(storage, shape): Made<P>| Tensor::from_storage(P::storage(storage), shape, BackpropOp::none(), false);
        let [found, judged] = [found, judged].map(|pair| pair.map(|pair| pair.map(tensor).into()).unzip());
        let ((head_types, errors), (precisions, precision_errors)) = (found, judged);
        Ok(Output { out: tensor(out), lse: tensor(lse), head_types, errors, precisions, precision_errors })
    }
}

/// The device with the memory and the context of a candle device.
fn device_of(device: &Device) -> Result<framestride::Device> {
    match device {
        #[cfg(feature = "emulator")]
        Device::Cpu => Ok(framestride::Device::emulator_on_host_memory()),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let context = device.cuda_stream().context().cu_ctx();
            // SAFETY: `Kernels` keeps the candle device, and so the context, until all that is made
            // in it is dropped.
            let gpu = unsafe { framestride::device::Gpu::borrow(context.cast()) };
            gpu.map(framestride::Device::from).map_err(Error::wrap)
        }
        device => no_kernels(device),
    }
}

fn no_kernels<T>(device: &Device) -> Result<T> {
    let allowed = "a CUDA device, with the feature cuda, or the CPU, with the feature emulator";
    refused("device", format!("{:?}", device.location()), allowed, "Turn on the feature, or use another device")
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "framestride"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(Call::new(self, &CpuDevice).launch([(q, q_layout), (k, k_layout), (v, v_layout)])?.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok(Call::new(self, &q.device).launch([(q, q_layout), (k, k_layout), (v, v_layout)])?.out)
    }
}
