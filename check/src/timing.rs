//! How fast the kernels of a spec are on a GPU, each by itself and the layer as a whole.
//!
//! A round times everything once. Each round has another order, so that drifting clocks reach all
//! alike. The medians over the rounds are reported.
//!
//! A sample is the mean of some launches, back to back between two events: so many that they last
//! [`SAMPLE_MILLISECONDS`]. As many untimed launches come first, since the power that earlier work
//! took decides how fast the GPU may clock.

use std::ops::RangeInclusive;
use std::sync::Arc;

use framestride::device::Buffer;
use framestride::launch::{EightBits, Launch, Launches, SixteenBits};
use framestride::shapes::layout::HeadType;
use framestride::shapes::params::Tensor;
use framestride::shapes::spec::{Compute, NormKind, Spec};
use framestride::{Device, Error, HeadTypes, Layer, Loading, Module, Result, SparseAttention, Stream, Workspace};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::Serialize;

use crate::device_tensors::{Arrangement, DeviceLayer, DeviceTensor, Placement};
use crate::random::{norm_weights, normal, row_generator};
use crate::rope::RopeTables;
use crate::tensors::{ELEMENT, Inputs, Tokens, narrow};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// pack, and attention with every head dense.
    Dense,
    /// pack, and attention with every head spatial.
    Spatial,
    /// pack, and attention with every head temporal.
    Temporal,
    /// The whole layer with profiled heads; profile, select and the second pack.
    Profiled,
}

impl Timed {
    /// All of them.
    pub const ALL: [Timed; 4] = [Timed::Dense, Timed::Spatial, Timed::Temporal, Timed::Profiled];
}

/// What is timed, and against what.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// What is timed.
    pub timed: Vec<Timed>,
    /// Bytes of a copy on the device, whose rate is the ceiling for memory. They are more than any
    /// cache holds.
    pub copy_bytes: u64,
    /// TFLOP/s of a large 16-bit matrix product on this GPU, which is the ceiling for arithmetic,
    /// where it is known.
    pub matmul_tflops: Option<f64>,
    /// The mean of the QK-norm's weights, where inputs are random. Scores grow with its square.
    pub qk_norm_weight: f64,
}

impl Default for BenchOptions {
    /// Everything is timed, against a copy of 1 GiB.
    fn default() -> BenchOptions {
        BenchOptions { timed: Timed::ALL.to_vec(), copy_bytes: 1 << 30, matmul_tflops: None, qk_norm_weight: 1.0 }
    }
}

/// One thing that was timed. `ms` and what is derived from it are medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name of the spec.
    #[serde(rename = "shape")]
    pub spec: String,
    /// What was timed:
    ///
    /// * `dense`, `sparse`: the attention kernel alone,
    /// * `pack`: norm, RoPE and reordering of all heads,
    /// * `profile`: the kernels profile and select,
    /// * `select`: select alone,
    /// * `repack`: the second pack of a profiled layer,
    /// * `layer`: a profiled layer as its user calls it,
    /// * `ceiling`: a copy.
    pub what: &'static str,
    /// `spatial` or `temporal`, where `what` can be done for either.
    pub mask: Option<&'static str>,
    /// The library that was timed: this one.
    pub who: &'static str,
    /// Time in milliseconds.
    pub ms: f64,
    /// Time of the fastest round.
    pub low: f64,
    /// Time of the slowest round.
    pub high: f64,
    /// Visible pairs x 4 x head_dim over the time, for attention.
    pub tflops: Option<f64>,
    /// Bytes that must be moved over the time. Each input is read once, and each output written
    /// once.
    pub gbps: Option<f64>,
    /// The share of the ceiling: of the matrix product's `tflops` for attention, of the copy's
    /// `gbps` for all else.
    pub of_ceiling: Option<f64>,
    /// Visible pairs over S².
    pub density: Option<f64>,
    /// It is not measured here: `bench/bench.py` fills it in.
    pub rel_error: Option<f64>,
}

/// Device memory of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// Bytes of one of Q, K, V.
    pub tensor_bytes: u64,
    /// Bytes of the workspace.
    pub workspace_bytes: u64,
    /// How many bytes of free memory a workspace and a profiled layer take beyond the user's
    /// tensors.
    pub beyond_bytes: Option<u64>,
    /// `beyond_bytes` over `tensor_bytes`.
    pub beyond_tensors: Option<f64>,
}

/// How long kernels took to load, in seconds ([`Loading`]).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LoadingSeconds {
    /// The template was filled in.
    pub fill: f64,
    /// The device loaded the kernels.
    pub load: f64,
    /// The part of `load` that the driver's compiler took. It is 0 when the driver found the
    /// kernels in its cache.
    pub compile: f64,
}

impl From<Loading> for LoadingSeconds {
    fn from(Loading { fill, load, compile, .. }: Loading) -> LoadingSeconds {
        LoadingSeconds { fill, load, compile }
    }
}

/// What was found of all kernels of a spec.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// Name of the spec.
    pub spec: String,
    /// SHA-256 of the PTX, as in its manifest. It tells which kernels these are.
    pub ptx_sha256: String,
    /// How long the kernels took to load.
    pub loading: LoadingSeconds,
    /// The GPU.
    pub device: String,
    /// Shape of Q: batch items, tokens, heads, head_dim.
    pub shape: [usize; 4],
    /// How many rounds the medians are taken over.
    pub rounds: usize,
    /// Device memory of a layer.
    pub memory: Memory,
    /// GB/s of the copy, counting bytes that are read and bytes that are written.
    pub copy_gbps: f64,
    /// The ceiling for arithmetic, as it was given.
    pub matmul_tflops: Option<f64>,
    /// Everything timed.
    pub rows: Vec<Row>,
}

/// The work of one sample.
enum Work {
    /// It launches these kernels, in order.
    Launches(Vec<Launch>),
    /// It launches a profiled layer, as its user does.
    Layer,
    /// It copies memory.
    Copy,
}

/// One thing to time.
struct Item {
    what: &'static str,
    mask: Option<HeadType>,
    /// Launches before each sample, which leave in the workspace what the work reads.
    before: Vec<Launch>,
    work: Work,
    /// Bytes that must be moved. For `repack` in 16 bits, what the temporal heads add is not
    /// counted here.
    bytes: u64,
    /// The visible pairs that the work computes.
    pairs: VisiblePairs,
    /// How often the work runs in a sample. It is 0 before the first sample.
    runs: u32,
    /// Milliseconds of one run, by round.
    samples: Vec<f64>,
}

/// The visible pairs of an item.
#[derive(Clone, Copy, PartialEq)]
enum VisiblePairs {
    /// The item is no attention.
    None,
    /// Every head has one type.
    All(HeadType),
    /// Heads have the types that profiling finds.
    Profiled,
}

/// The least time of a sample.
pub const SAMPLE_MILLISECONDS: f64 = 20.0;

/// How often the work of a sample may run.
const RUNS: RangeInclusive<u32> = 1..=500;

/// How many random values fill Q, how many K and how many V, over and over. The number is odd, so
/// that no two rows are equal.
const POOL: usize = (1 << 24) + 1;

/// Everything that rounds need, on the device.
pub struct Bench {
    module: Arc<Module>,
    attention: SparseAttention,
    workspace: Workspace,
    inputs: BenchInputs,
    copy: [Buffer; 2],
    matmul_tflops: Option<f64>,
    memory: Memory,
    items: Vec<Item>,
    /// Types of heads that are all alike, `[3, batch, heads]`, in the order of the types' values.
    /// Launches hold addresses in it.
    types: Buffer,
    /// Precisions of heads that are all in 8 bits, `[batch, heads]`.
    precisions: Buffer,
}

/// A layer's tensors.
struct BenchInputs {
    layer: Layer,
    shape: [usize; 4],
    out: DeviceTensor,
    /// Held so that their memory lives.
    _memory: Vec<Buffer>,
    _placed: Option<DeviceLayer>,
}

impl Bench {
    /// Puts inputs and workspace on the device. Without `inputs`, they are normal values for the
    /// spec's own batch and heads.
    pub fn new(module: &Arc<Module>, inputs: Option<&Inputs>, options: &BenchOptions) -> Result<Bench> {
        let (spec, device) = (module.spec(), module.device());
        let inputs = match inputs {
            Some(inputs) => BenchInputs::given(device, spec, inputs)?,
            None => BenchInputs::random(device, spec, options.qk_norm_weight)?,
        };
        let [batch, _, heads, _] = inputs.shape;
        let attention = SparseAttention::new(module, batch as u32, heads as u32)?;
        let all_heads = batch * heads;
        let types: Vec<u8> =
            HeadType::ALL.into_iter().flat_map(|head| (head as u32).to_le_bytes().repeat(all_heads)).collect();
        let types = device.upload(&types)?;
        let precisions = device.upload(&Compute::E4m3.bits().to_le_bytes().repeat(all_heads))?;
        let copy = [device.allocate(options.copy_bytes)?, device.allocate(options.copy_bytes)?];
        device.fill(Stream::DEFAULT, &copy[0], 0x5a)?;

        device.synchronize()?;
        let before = free_memory(device)?;
        let workspace = Workspace::allocate(device, attention.workspace_bytes())?;
        // SAFETY: all memory is this value's own or the caller's for the call, sized by the
        // library, and the work is waited for.
        unsafe { attention.forward(Stream::DEFAULT, &inputs.layer, HeadTypes::Profiled, &workspace)? };
        device.synchronize()?;
        let after = free_memory(device)?;
        let tensor_bytes = spec.tensor_bytes(batch as u32, heads as u32);
        let beyond_bytes = before.zip(after).map(|(before, after)| before.saturating_sub(after));
        let memory = Memory {
            tensor_bytes,
            workspace_bytes: attention.workspace_bytes(),
            beyond_bytes,
            beyond_tensors: beyond_bytes.map(|bytes| bytes as f64 / tensor_bytes as f64),
        };

        let mut bench = Bench {
            module: Arc::clone(module),
            attention,
            workspace,
            inputs,
            copy,
            matmul_tflops: options.matmul_tflops,
            memory,
            items: Vec::new(),
            types,
            precisions,
        };
        bench.items = bench.items_of(&options.timed)?;
        Ok(bench)
    }

    /// The items that `timed` asks for, and the copy.
    fn items_of(&self, timed: &[Timed]) -> Result<Vec<Item>> {
        let spec = self.module.spec();
        let [batch, _, heads, _] = self.inputs.shape;
        let tensor = self.memory.tensor_bytes;
        let tables = spec.rope_table_bytes(heads as u32);
        // Three tensors are read, and three images written.
        let packed = match spec.compute {
            Compute::Dtype => 6 * tensor,
            Compute::E4m3 => 3 * tensor + 3 * tensor / 2,
        };
        let item = |what, mask, before: &[Launch], work: &[Launch], bytes, pairs| Item {
            what,
            mask,
            before: before.to_vec(),
            work: Work::Launches(work.to_vec()),
            bytes,
            pairs,
            runs: 0,
            samples: Vec::new(),
        };
        // Where the spec has a bound of precisions, heads of given types are in 8 bits.
        let layer = |types| match types {
            HeadTypes::Given(_) if spec.largest_error.is_some() => {
                Layer { precisions: self.precisions.address(), ..self.inputs.layer }
            }
            _ => self.inputs.layer,
        };
        let launches = |types| self.attention.launches(&layer(types), types, &self.workspace);
        let copied = 2 * self.copy[0].bytes();
        let mut items = vec![Item { work: Work::Copy, ..item("ceiling", None, &[], &[], copied, VisiblePairs::None) }];
        for (head, wanted) in
            HeadType::ALL.into_iter().zip([Timed::Dense, Timed::Spatial, Timed::Temporal].map(|t| timed.contains(&t)))
        {
            if !wanted {
                continue;
            }
            let address = self.types.address() + (head as usize * batch * heads * 4) as u64;
            let given = launches(HeadTypes::Given(address))?;
            let (pack, attention) = parts(&given);
            let mask = (head != HeadType::Dense).then_some(head);
            // Dense heads lie in the spatial layout, so packing them is the same work as packing
            // spatial ones.
            if head == HeadType::Temporal || !items.iter().any(|item| item.what == "pack") {
                let order = (head == HeadType::Temporal).then_some(head);
                items.push(item("pack", order, &[], &pack, packed + tables, VisiblePairs::None));
            }
            let what = if mask.is_some() { "sparse" } else { "dense" };
            items.push(item(what, mask, &pack, &attention, 4 * tensor, VisiblePairs::All(head)));
        }
        if timed.contains(&Timed::Profiled) {
            let all = launches(HeadTypes::Profiled)?;
            if let Some(profiling) = all.profiling {
                let in_order: Vec<Launch> = profiling.in_order().copied().collect();
                let packs: Vec<Launch> = profiling.of_keys().map(|keys| keys.pack).collect();
                let profiles = profiling.of_keys().map(|keys| keys.profile).chain([profiling.select]);
                let profiles: Vec<Launch> = profiles.collect();
                let (select, before) = (&in_order[in_order.len() - 1..], &in_order[..in_order.len() - 1]);
                let partials = &self.attention.workspace_layout().partials;
                let partial_bytes = partials.end - partials.start;
                items.push(item("profile", None, &packs, &profiles, 2 * tensor, VisiblePairs::None));
                items.push(item("select", None, before, select, partial_bytes, VisiblePairs::None));
                // In 16 bits it moves Q, and K and V of as many heads as come out temporal.
                let repacked = if spec.compute == Compute::Dtype { 2 * tensor } else { packed };
                items.push(item("repack", None, &in_order, &parts(&all).0, repacked + tables, VisiblePairs::Profiled));
            }
            let layer = item("layer", None, &[], &[], 4 * tensor + tables, VisiblePairs::Profiled);
            items.push(Item { work: Work::Layer, ..layer });
        }
        Ok(items)
    }

    /// Times everything once more. `progress` hears what is being timed.
    pub fn round(&mut self, progress: &dyn Fn(&str)) -> Result<()> {
        let mut items = std::mem::take(&mut self.items);
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.shuffle(&mut row_generator(1, items.first().map_or(0, |item| item.samples.len()) as u64));
        let done = order.into_iter().try_for_each(|index| {
            progress(items[index].what);
            self.sample(&mut items[index])
        });
        self.items = items;
        done
    }

    fn sample(&self, item: &mut Item) -> Result<()> {
        let device = self.module.device();
        let launch = |launches: &[Launch]| {
            // SAFETY: as for the whole layer, below.
            launches.iter().try_for_each(|launch| unsafe { self.attention.launch(Stream::DEFAULT, launch) })
        };
        let once = || match &item.work {
            Work::Launches(launches) => launch(launches),
            // SAFETY: all memory is this value's own or the caller's for the call, sized by the
            // library, and the work is waited for.
            Work::Layer => unsafe {
                self.attention.forward(Stream::DEFAULT, &self.inputs.layer, HeadTypes::Profiled, &self.workspace)
            },
            Work::Copy => device.copy(Stream::DEFAULT, &self.copy[0], &self.copy[1]),
        };
        launch(&item.before)?;
        if item.runs == 0 {
            // The first run of all warms the GPU up. The second tells how often to run.
            once()?;
            let milliseconds = device.time(Stream::DEFAULT, once)?;
            item.runs = ((SAMPLE_MILLISECONDS / milliseconds).ceil() as u32).clamp(*RUNS.start(), *RUNS.end());
        }
        let all = || (0..item.runs).try_for_each(|_| once());
        all()?;
        let milliseconds = device.time(Stream::DEFAULT, all)?;
        item.samples.push(milliseconds / f64::from(item.runs));
        Ok(())
    }

    /// The medians over the rounds so far. There must have been one.
    pub fn report(&self) -> Result<BenchReport> {
        let spec = self.module.spec();
        let [batch, _, heads, _] = self.inputs.shape;
        let types: Vec<HeadType> = if self.items.iter().any(|item| item.pairs == VisiblePairs::Profiled) {
            // Where two launches profile half of the keys each, they were timed on the same rows.
            // SAFETY: all memory is this value's own or the caller's for the call, sized by the
            // library, and the work is waited for.
            unsafe { self.attention.profile(Stream::DEFAULT, &self.inputs.layer, &self.workspace)? };
            self.attention.read_profile(&self.workspace)?.iter().map(|profile| profile.head_type).collect()
        } else {
            Vec::new()
        };
        let temporal = types.iter().filter(|&&head| head == HeadType::Temporal).count() as f64;
        let copy_gbps = self
            .items
            .iter()
            .find(|item| item.what == "ceiling")
            .map_or(f64::NAN, |item| item.bytes as f64 / median(&item.samples) / 1e6);
        let rows = self.items.iter().map(|item| {
            let ms = median(&item.samples);
            let (flops, density) = match item.pairs {
                VisiblePairs::None => (None, None),
                VisiblePairs::All(head) => {
                    (Some(spec.flops(head) as f64 * (batch * heads) as f64), Some(spec.density(head)))
                }
                VisiblePairs::Profiled if item.what == "layer" => {
                    let flops = types.iter().map(|&head| spec.flops(head) as f64).sum();
                    let density = types.iter().map(|&head| spec.density(head)).sum::<f64>() / types.len() as f64;
                    (Some(flops), Some(density))
                }
                VisiblePairs::Profiled => (None, None),
            };
            let bytes = if item.what == "repack" && spec.compute == Compute::Dtype {
                item.bytes as f64 + temporal / types.len() as f64 * 4.0 * self.memory.tensor_bytes as f64
            } else {
                item.bytes as f64
            };
            let (tflops, gbps) = (flops.map(|flops| flops / ms / 1e9), bytes / ms / 1e6);
            let of_ceiling = match tflops {
                Some(tflops) => self.matmul_tflops.map(|ceiling| tflops / ceiling),
                None => Some(gbps / copy_gbps),
            };
            Row {
                spec: spec.name.clone(),
                what: item.what,
                mask: item.mask.map(HeadType::name),
                who: "framestride",
                ms,
                low: item.samples.iter().copied().fold(f64::INFINITY, f64::min),
                high: item.samples.iter().copied().fold(0.0, f64::max),
                tflops,
                gbps: Some(gbps),
                of_ceiling,
                density,
                rel_error: None,
            }
        });
        Ok(BenchReport {
            spec: spec.name.clone(),
            ptx_sha256: self.module.manifest().ptx_sha256.clone(),
            loading: LoadingSeconds::from(self.module.loading()),
            device: self.module.device().name(),
            shape: self.inputs.shape,
            rounds: self.items.iter().map(|item| item.samples.len()).min().unwrap_or(0),
            memory: self.memory.clone(),
            copy_gbps,
            matmul_tflops: self.matmul_tflops,
            rows: rows.collect(),
        })
    }

    /// The output that the last attention of the rounds left.
    pub fn output(&self) -> Result<Tokens> {
        Ok(self.inputs.out.download(self.module.device())?.0)
    }
}

/// Bytes of device memory that nobody has allocated; the emulator does not count them.
/// What a layer launches to pack heads, and to compute them, of each precision that they may have.
fn parts(launches: &Launches) -> (Vec<Launch>, Vec<Launch>) {
    let (mut pack, mut attention) = (Vec::new(), Vec::new());
    if let Some(EightBits { center, pack: queries_and_keys, pack_values, attention: eight, .. }) = launches.eight_bits {
        pack.extend([center, queries_and_keys, pack_values]);
        attention.push(eight);
    }
    if let Some(SixteenBits { pack: all, attention: sixteen, .. }) = launches.sixteen_bits {
        pack.push(all);
        attention.push(sixteen);
    }
    (pack, attention)
}

fn free_memory(device: &Device) -> Result<Option<u64>> {
    match device {
        Device::Gpu(gpu) => gpu.free_memory().map(Some),
        _ => Ok(None),
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count => (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0,
    }
}

impl BenchInputs {
    fn given(device: &Device, spec: &Spec, inputs: &Inputs) -> Result<BenchInputs> {
        inputs.check(spec, "inputs")?;
        let placed = DeviceLayer::upload(device, &spec.layout, inputs, Placement::all(Arrangement::TokensFirst))?;
        let shape = inputs.q.shape();
        let out = DeviceTensor::poisoned(device, spec.dtype, shape, Arrangement::TokensFirst)?;
        let layer = Layer { out: out.tensor(), lse: 0, ..placed.layer };
        Ok(BenchInputs { layer, shape, out, _memory: Vec::new(), _placed: Some(placed) })
    }

    /// Normal values for Q, K and V, norm weights around `qk_norm_weight`, and RoPE of the spec's
    /// grid. All text is valid.
    fn random(device: &Device, spec: &Spec, qk_norm_weight: f64) -> Result<BenchInputs> {
        let allowed = if spec.qk_norm.is_some() { "a number from 0 to 1000" } else { "1: the spec has no [qk_norm]" };
        if !(0.0..=1000.0).contains(&qk_norm_weight) || (spec.qk_norm.is_none() && qk_norm_weight != 1.0) {
            return Err(Error::input("qk_norm_weight", qk_norm_weight, allowed, "Leave it out for weights around 1"));
        }
        let shape @ [batch, sequence, heads, head_dim] =
            [spec.batch, spec.layout.sequence(), spec.heads, spec.head_dim].map(|extent| extent as usize);
        let mut memory = Vec::new();
        let mut keep = |buffer: Buffer| {
            let address = buffer.address();
            memory.push(buffer);
            address
        };
        let elements = batch * sequence * heads * head_dim;
        let mut tensor = |which: u64| -> Result<Tensor> {
            let pool = pool(spec, elements.min(POOL), which);
            let buffer = device.allocate((elements * ELEMENT) as u64)?;
            for offset in (0..elements * ELEMENT).step_by(pool.len()) {
                device.write(&buffer, offset as u64, &pool[..pool.len().min(elements * ELEMENT - offset)])?;
            }
            let row = heads * head_dim;
            let strides = [sequence * row, row, head_dim].map(|stride| stride as u64);
            Ok(Tensor { data: keep(buffer), batch: strides[0], row: strides[1], head: strides[2] })
        };
        let (q, k, v) = (tensor(0)?, tensor(1)?, tensor(2)?);
        let out = DeviceTensor::poisoned(device, spec.dtype, shape, Arrangement::TokensFirst)?;
        let mut layer = Layer { q, k, v, out: out.tensor(), ..Layer::default() };
        let mut floats = |values: &[f32]| -> Result<u64> {
            Ok(keep(device.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?))
        };
        if let Some(norm) = &spec.qk_norm {
            let mut generator = row_generator(0, u64::MAX);
            let mut around =
                |centre: f64| -> Result<u64> { floats(&norm_weights(spec, heads, centre, &mut generator)) };
            for weights in [&mut layer.q_norm, &mut layer.k_norm] {
                weights.weight = around(qk_norm_weight)?;
                weights.bias = if norm.kind == NormKind::Layer { around(0.0)? } else { 0 };
            }
        }
        if spec.rope.is_some() {
            let tables = RopeTables::from_grid(spec, heads);
            (layer.cos, layer.sin) = (floats(&tables.cos)?, floats(&tables.sin)?);
        }
        Ok(BenchInputs { layer, shape, out, _memory: memory, _placed: None })
    }
}

/// `elements` standard normal values of the spec's type. `which` is the number of the tensor: each
/// has values of its own.
fn pool(spec: &Spec, elements: usize, which: u64) -> Vec<u8> {
    const CHUNK: usize = 1 << 14;
    let mut bytes = vec![0; elements * ELEMENT];
    bytes.par_chunks_mut(CHUNK * ELEMENT).enumerate().for_each(|(chunk, bytes)| {
        let mut generator = row_generator(which, chunk as u64);
        for element in bytes.as_chunks_mut::<ELEMENT>().0 {
            *element = narrow(spec.dtype, normal(&mut generator)).to_le_bytes();
        }
    });
    bytes
}
