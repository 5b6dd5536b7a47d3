//! Whether a profiled layer gives the same bytes however it is launched: again, from a CUDA graph,
//! and beside another layer.
//!
//! [`crate::verify`] looks at the numbers themselves. Here, the results of one plain launch are the
//! reference, and whatever follows must equal them byte for byte. Before each run, output,
//! log-sum-exp and workspace are filled with a byte that differs from that of the run before. So a
//! result that depends on what lay there differs too.
//!
//! * **again**: the same layer is run again.
//! * **graph**: a layer is captured once and replayed up to [`REPLAYS`] times. Before each replay,
//!   one of up to [`SETS`] sets of inputs is copied over those that the graph reads. A set is Q, K
//!   and V, norm weights, RoPE tables and text lengths. So head types and text lengths change under
//!   the graph.
//! * **two streams**: two layers, each with inputs, output and workspace of its own, are launched
//!   in turn on two streams. Nothing waits except for comparisons.
//!
//! Runs of large layers stop when they have taken [`MILLISECONDS`]. No more than [`READ_BYTES`] of
//! their results are read back, at runs that lie evenly. Each [`Check`](crate::checks::Check) says
//! how many runs there were, and how many were compared. The emulator has neither graphs nor
//! streams: there the layer is run again, once.

use std::ops::Range;
use std::sync::Arc;

use framestride::device::{Buffer, Gpu, OwnedStream};
use framestride::shapes::spec::Spec;
use framestride::{Device, Error, HeadTypes, Module, Result, SparseAttention, Stream, Workspace};
use rand::RngExt;
use rayon::prelude::*;

use crate::checks::{Checks, Worst};
use crate::device_tensors::{Arrangement, DeviceLayer, POISON, Placement};
use crate::memory_fit::{self, Free};
use crate::random::row_generator;
use crate::tensors::Inputs;

/// How often a GPU runs the layer again.
pub const REPEATS: u64 = 8;

/// How often a graph is replayed at most.
pub const REPLAYS: u64 = 1000;

/// How many sets of inputs a graph's replays take, where memory has room for them.
pub const SETS: usize = 4;

/// How many rounds there are at most on two streams. A round launches both layers.
pub const ROUNDS: u64 = 200;

/// After so many rounds on two streams, results are compared. Until then nothing waits.
const BURST: u64 = 10;

/// Time that the replays of a graph may take, and the rounds on two streams. It is enough for about
/// fifty replays of the largest shipped spec on an H200.
pub const MILLISECONDS: f64 = 5_000.0;

/// Bytes of one quantity that a check may read back from the device.
pub const READ_BYTES: u64 = 16 << 30;

/// What a layer leaves: the kernel that writes it, and the name of what it writes. Only a spec with a
/// bound of precisions leaves the last two.
const QUANTITIES: [(&str, &str); 6] = [
    ("attention", "output"),
    ("attention", "log-sum-exp"),
    ("select", "mean squared errors"),
    ("select", "head types"),
    ("judge", "errors of 8 bits"),
    ("judge", "precisions"),
];

/// How many layers are launched, and with how many heads. It is as much as memory has room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope {
    /// Batch items and heads of each layer.
    pub extent: [u32; 2],
    /// How many sets of inputs a graph's replays take.
    sets: usize,
}

impl Scope {
    pub fn new(spec: &Spec, device: &Device, free: Free) -> Result<Scope> {
        let wanted = [spec.batch, spec.heads];
        let Device::Gpu(_) = device else {
            let need = |extent| memory_fit::repeated(spec, device, extent, [1, 1], 1);
            return Ok(Scope { extent: free.fit(spec, wanted, need)?, sets: 1 });
        };
        let fit = |sets: usize| {
            let need = |extent| memory_fit::repeated(spec, device, extent, [sets as u64 + 1, 2], sets as u64);
            Ok(Scope { extent: free.fit(spec, wanted, need)?, sets })
        };
        // Where memory is short, fewer heads come before fewer sets.
        fit(SETS).or_else(|_: Error| fit(2))
    }
}

/// Launches a profiled layer in all ways that the device has. `progress` hears what is being done.
pub(crate) fn verify_launches(
    module: &Arc<Module>,
    scope: Scope,
    seed: u64,
    progress: &dyn Fn(&str),
) -> Result<Checks> {
    let device = module.device();
    let Scope { extent: [batch, heads], sets } = scope;
    let gpu = if let Device::Gpu(gpu) = device { Some(gpu) } else { None };
    // A GPU has a layer for each set, and one whose inputs are replaced before each replay. Two of
    // them run at a time.
    let (layers, workspaces, repeats) = if gpu.is_some() { (sets + 1, 2, REPEATS) } else { (1, 1, 1) };
    let spec = module.spec();
    let attention = SparseAttention::new(module, batch, heads)?;
    let layer = |set| {
        let seed = seed.wrapping_add(set as u64);
        let mut inputs = Inputs::random(spec, batch as usize, heads as usize, seed);
        let mut generator = row_generator(seed, u64::MAX);
        let mut lengths =
            |text: u32| (text > 0).then(|| (0..batch).map(|_| generator.random_range(0..=text)).collect());
        (inputs.before.lengths, inputs.after.lengths) = (lengths(spec.layout.before), lengths(spec.layout.after));
        DeviceLayer::upload(device, &module.spec().layout, &inputs, Placement::all(Arrangement::TokensFirst))
    };
    progress("inputs of launches in several ways");
    let launched = LaunchedLayers {
        layers: (0..layers).map(layer).collect::<Result<_>>()?,
        workspaces: (0..workspaces).map(|_| device.allocate(attention.workspace_bytes())).collect::<Result<_>>()?,
        attention,
    };
    // A copy may still be under way when its call returns, and the streams below do not wait for
    // the default one.
    device.synchronize()?;

    progress("a layer, run again");
    let expected = (0..sets).map(|set| launched.alone(set)).collect::<Result<Vec<Results>>>()?;
    let mut checks = launched.again(&expected[0], repeats)?;
    if let Some(gpu) = gpu {
        progress("a CUDA graph, replayed");
        checks.extend(launched.graph(gpu, &expected, seed)?);
        progress("two streams at a time");
        checks.extend(launched.two_streams(gpu, &expected)?);
    }
    Ok(checks)
}

/// How many runs of `milliseconds` each fit the time, up to `most`.
fn affordable(milliseconds: f64, most: u64) -> u64 {
    ((MILLISECONDS / milliseconds) as u64).clamp(1, most)
}

/// The bytes of each of [`QUANTITIES`].
type Results = Vec<Vec<u8>>;

/// A layer and the workspace that it runs in.
#[derive(Clone, Copy)]
struct Lane<'a> {
    layer: &'a DeviceLayer,
    workspace: &'a Buffer,
}

/// The layers that are launched, and their workspaces.
struct LaunchedLayers {
    attention: SparseAttention,
    layers: Vec<DeviceLayer>,
    workspaces: Vec<Buffer>,
}

impl LaunchedLayers {
    fn device(&self) -> &Device {
        self.attention.module().device()
    }

    fn lane(&self, layer: usize, workspace: usize) -> Lane<'_> {
        Lane { layer: &self.layers[layer], workspace: &self.workspaces[workspace] }
    }

    /// Fills all that a layer writes with a byte, in stream order. Each run has another byte than
    /// the one before.
    fn poison(&self, stream: Stream, lane: Lane, run: u64) -> Result<()> {
        let byte = POISON.wrapping_sub(run as u8);
        let [out, lse] = lane.layer.results();
        [out, lse, lane.workspace].into_iter().try_for_each(|buffer| self.device().fill(stream, buffer, byte))
    }

    fn forward(&self, stream: Stream, lane: Lane) -> Result<()> {
        // SAFETY: all memory is this value's, is sized by the library, and outlives the work. On
        // the default stream a comparison waits for the work. A stream of one's own is dropped
        // before this value, which waits too. Two lanes share no memory.
        unsafe {
            let workspace = Workspace::borrow(self.device(), lane.workspace.address(), lane.workspace.bytes());
            self.attention.forward(stream, &lane.layer.layer, HeadTypes::Profiled, &workspace)
        }
    }

    /// Where each of [`QUANTITIES`] lies.
    fn quantities<'a>(&self, lane: Lane<'a>) -> Vec<(&'a Buffer, Range<u64>)> {
        let ([out, lse], plan) = (lane.layer.results(), self.attention.workspace_layout());
        let mut quantities = vec![(out, 0..out.bytes()), (lse, 0..lse.bytes())];
        let mut found = vec![&plan.errors, &plan.head_types];
        if self.attention.module().spec().largest_error.is_some() {
            found.extend([&plan.precision_errors, &plan.precisions]);
        }
        quantities.extend(found.into_iter().map(|range| (lane.workspace, range.clone())));
        quantities
    }

    fn read(&self, lane: Lane, quantity: usize) -> Result<Vec<u8>> {
        let (buffer, Range { start, end }) = self.quantities(lane)[quantity].clone();
        self.device().read(buffer, start, end - start)
    }

    /// Launches one layer plainly, and reads its results.
    fn alone(&self, layer: usize) -> Result<Results> {
        let lane = self.lane(layer, 0);
        self.poison(Stream::DEFAULT, lane, 0)?;
        self.forward(Stream::DEFAULT, lane)?;
        (0..self.quantities(lane).len()).map(|quantity| self.read(lane, quantity)).collect()
    }

    fn again(&self, expected: &Results, repeats: u64) -> Result<Checks> {
        let lane = self.lane(0, 0);
        let mut comparison = Comparison::new("profiled, run again", repeats, repeats, expected);
        for run in 1..=repeats {
            self.poison(Stream::DEFAULT, lane, run)?;
            self.forward(Stream::DEFAULT, lane)?;
            comparison.compare(self, &[(lane, expected)], || format!("run {run}"))?;
        }
        Ok(comparison.checks())
    }

    fn graph(&self, gpu: &Arc<Gpu>, expected: &[Results], seed: u64) -> Result<Checks> {
        let (device, lane) = (self.device(), self.lane(expected.len(), 0));
        let stream = OwnedStream::new(gpu)?;
        let graph = stream.capture(|stream| self.forward(stream, lane))?;
        let replay = |set: usize, run: u64| {
            self.layers[set].copy_inputs(device, stream.borrow(), lane.layer)?;
            self.poison(stream.borrow(), lane, run)?;
            // SAFETY: module and memory are this value's, and `stream`, which waits for the work,
            // is dropped before it.
            unsafe { graph.launch(stream.borrow()) }
        };
        // The first replay takes longer than the others, so it is not timed.
        replay(0, 0)?;
        let replays = affordable(device.time(stream.borrow(), || replay(0, 0))?, REPLAYS);
        let mut comparison =
            Comparison::new("profiled, a CUDA graph with inputs that change", replays, replays, &expected[0]);
        let mut generator = row_generator(seed, u64::MAX);
        for run in 1..=replays {
            // Sets come at random, so that evenly spread comparisons meet all of them.
            let set = generator.random_range(0..expected.len());
            replay(set, run)?;
            comparison.compare(self, &[(lane, &expected[set])], || format!("replay {run}, inputs {set}"))?;
        }
        Ok(comparison.checks())
    }

    fn two_streams(&self, gpu: &Arc<Gpu>, expected: &[Results]) -> Result<Checks> {
        let lanes = [self.lane(0, 0), self.lane(1, 1)];
        let streams = [OwnedStream::new(gpu)?, OwnedStream::new(gpu)?];
        let launch = |index: usize, run: u64| {
            let stream = streams[index].borrow();
            self.poison(stream, lanes[index], run)?;
            self.forward(stream, lanes[index])
        };
        let milliseconds = self.device().time(streams[0].borrow(), || launch(0, 0))?;
        let bursts = affordable(2.0 * milliseconds, ROUNDS).div_ceil(BURST);
        let mut comparison =
            Comparison::new("profiled, two streams at a time", 2 * bursts * BURST, bursts, &expected[0]);
        for burst in 0..bursts {
            for round in 1..=BURST {
                [0, 1].into_iter().try_for_each(|index| launch(index, burst * BURST + round))?;
            }
            let of_both = [(lanes[0], &expected[0]), (lanes[1], &expected[1])];
            comparison.compare(self, &of_both, || format!("round {}", (burst + 1) * BURST))?;
        }
        Ok(comparison.checks())
    }
}

/// Comparisons of one way to launch.
struct Comparison {
    case: &'static str,
    /// How many runs there are in all.
    runs: u64,
    /// How often results may be compared. These points are evenly spread over the runs.
    points: u64,
    /// How many points were passed so far.
    passed: u64,
    worst: Vec<Worst>,
}

impl Comparison {
    fn new(case: &'static str, runs: u64, points: u64, expected: &Results) -> Comparison {
        Comparison { case, runs, points, passed: 0, worst: expected.iter().map(|_| Worst::new()).collect() }
    }

    /// Waits, and compares those quantities of the lanes that are due at this point. `run` names
    /// it.
    fn compare(
        &mut self,
        launched: &LaunchedLayers,
        lanes: &[(Lane, &Results)],
        run: impl Fn() -> String,
    ) -> Result<()> {
        for (quantity, worst) in self.worst.iter_mut().enumerate() {
            let bytes: u64 = lanes.iter().map(|(_, expected)| expected[quantity].len() as u64).sum();
            if !is_due(self.passed, self.points, READ_BYTES / bytes) {
                continue;
            }
            for (number, (lane, expected)) in lanes.iter().enumerate() {
                let (count, first) = difference(&launched.read(*lane, quantity)?, &expected[quantity]);
                worst.add(count as f64, 0.0, || {
                    format!("{}, layer {number}: {count} bytes differ, the first at {first}", run())
                });
            }
        }
        self.passed += 1;
        Ok(())
    }

    fn checks(self) -> Checks {
        let of_worst = self.worst.into_iter().zip(QUANTITIES);
        let mut checks =
            of_worst.map(|(worst, (kernel, quantity))| worst.check(kernel, self.case, quantity, (self.runs, "runs")));
        let first = checks.next().expect("a layer has an output");
        Checks::new(first, checks)
    }
}

/// Whether point `index` of `points` is one of `most` points that lie evenly. The last one always
/// is.
fn is_due(index: u64, points: u64, most: u64) -> bool {
    let most = most.clamp(1, points);
    (index + 1) * most / points > index * most / points
}

/// How many bytes of two results differ, and where the first of them is.
fn difference(found: &[u8], expected: &[u8]) -> (u64, usize) {
    /// How many bytes are compared at a time.
    const PIECE: usize = 1 << 20;
    let pieces = found.par_chunks(PIECE).zip(expected.par_chunks(PIECE)).enumerate();
    pieces
        .filter(|(_, (found, expected))| found != expected)
        .map(|(piece, (found, expected))| {
            let differ = |index: &usize| found[*index] != expected[*index];
            let first = (0..found.len()).find(differ).map_or(usize::MAX, |index| piece * PIECE + index);
            ((0..found.len()).filter(differ).count() as u64, first)
        })
        .reduce(|| (0, usize::MAX), |a, b| (a.0 + b.0, a.1.min(b.1)))
}

#[cfg(test)]
mod tests {
    use super::{difference, is_due};

    #[test]
    fn points_lie_evenly() {
        let due = |points, most| (0..points).filter(|&index| is_due(index, points, most)).collect::<Vec<u64>>();
        assert_eq!(due(4, 100), [0, 1, 2, 3]);
        assert_eq!(due(10, 3), [3, 6, 9]);
        assert_eq!(due(1000, 1), [999]);
        assert_eq!(due(5, 0), [4], "a result of any size is compared once");
    }

    #[test]
    fn differences_are_counted() {
        let expected = vec![7; (2 << 20) + 3];
        let mut found = expected.clone();
        assert_eq!(difference(&found, &expected).0, 0);
        for index in [2 << 20, (1 << 20) + 5, (2 << 20) + 2] {
            found[index] = 0;
        }
        assert_eq!(difference(&found, &expected), (3, (1 << 20) + 5));
    }
}
