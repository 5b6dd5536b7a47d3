//! Attention in 16 bits over so many keys that an accumulator which had them all would be visibly
//! too small.
//!
//! A whole layer of that length is too much for the emulator. So **attention** is launched by
//! itself, and its schedule ends with the first query tile.

use framestride::Kernels;
use framestride::shapes::arch::Arch;
use framestride::shapes::blocks::ANCHOR_TILES;
use framestride::shapes::image::{CHUNK_BYTES, Image};
use framestride::shapes::params::{AttentionParams, SCHEDULE_BYTES, Tensor};
use framestride::shapes::spec::{Dtype, Spec};
use framestride_check::tensors::{narrow, widen};
use ptx_emulator::{LaunchConfig, Memory, Module, Options};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Keys: so many tiles of head dim 128 that anchors are put twice. With head dim 64 they are put
/// four times.
const KEYS: usize = 3 * ANCHOR_TILES as usize * 176;
/// The rows that are compared: some share a thread, and others share none.
const ROWS: [usize; 6] = [0, 8, 21, 29, 100, 127];

/// Rows of f16 that fill an image.
struct Rows {
    image: Image,
    bits: Vec<u16>,
}

impl Rows {
    fn new(head_dim: u32, count: usize, mut element: impl FnMut(usize, usize) -> f64) -> Rows {
        let image = Image { head_dim, dtype: Dtype::F16 };
        let width = head_dim as usize;
        Rows { image, bits: (0..count * width).map(|i| narrow(Dtype::F16, element(i / width, i % width))).collect() }
    }

    fn row(&self, row: usize) -> impl Iterator<Item = f64> {
        let width = self.image.head_dim as usize;
        self.bits[row * width..][..width].iter().map(|&bits| widen(Dtype::F16, bits))
    }

    /// The bytes of the image, in `bytes` bytes.
    fn bytes(&self, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        let elements = self.image.chunk_elements() as usize;
        for (i, chunk) in self.bits.chunks(elements).enumerate() {
            let (row, chunk_of_row) = (i as u32 / self.image.row_chunks(), i as u32 % self.image.row_chunks());
            let place = self.image.chunk(row, chunk_of_row) as usize;
            for (to, bits) in out[place..][..CHUNK_BYTES as usize].chunks_mut(2).zip(chunk) {
                to.copy_from_slice(&bits.to_le_bytes());
            }
        }
        out
    }
}

/// Launches the first query tile. Scores, as exponents of two, are as of N(0, 1) and `mean(key)`
/// beside. Each channel of V has a mean of its own, between 1 and 2. The mean error must be below
/// 1e-4 of the output, and no element may be off by more than 1.5 units in its last place.
fn compare(head_dim: u32, seed: u64, mean: impl Fn(usize) -> f64) {
    let text = format!(
        "name = \"many_keys\"\n[video]\nframes = {}\ntokens_per_frame = 1024\n[attention]\nheads = 1\nhead_dim = {head_dim}\n
        dtype = \"f16\"\n[masks.spatial]\nhalf_width = 9\n[masks.temporal]\nhalf_width = 9\n",
        KEYS / 1024
    );
    let spec = Spec::parse("many_keys", &text).unwrap();
    let kernels = Kernels::for_spec(&spec, Arch::SM_90A).unwrap();
    let query_rows = spec.tiles(Arch::SM_90A).query_rows;

    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = || -> f64 { StandardNormal.sample(&mut generator) };
    let root = f64::from(head_dim).sqrt();
    let mut of = |channel: usize, mean: f64, size: f64| if channel == 0 { mean } else { normal() * size };
    let queries = Rows::new(head_dim, query_rows as usize, |_, channel| of(channel, 1.0, 1.0 / root));
    let keys = Rows::new(head_dim, KEYS, |key, channel| of(channel, mean(key), std::f64::consts::LOG2_E));
    let values = Rows::new(head_dim, KEYS, |_, channel| 1.0 + channel as f64 / f64::from(head_dim) + normal() / 16.0);

    let mut memory = Memory::new();
    let mut place = |bytes: &[u8]| {
        let address = memory.alloc(bytes.len() as u64, 256).unwrap();
        memory.write(address, bytes).unwrap();
        address
    };
    let image_bytes = queries.image.bytes(spec.layout.packed_rows()) as usize;
    let out_bytes = queries.image.bytes(query_rows) as usize;
    let out = place(&vec![0xff; out_bytes]);
    // The block is told that all other query tiles have been taken.
    let taken = (KEYS as u32).div_ceil(query_rows);
    let schedule: Vec<u8> = [taken, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(schedule.len() as u64, SCHEDULE_BYTES);
    let params = AttentionParams {
        packed_q: place(&queries.bytes(image_bytes)),
        packed_k: place(&keys.bytes(image_bytes)),
        packed_v: place(&values.bytes(image_bytes)),
        out: Tensor { data: out, batch: 0, row: head_dim.into(), head: 0 },
        schedule: place(&schedule),
        batch: 1,
        heads: 1,
        spatial_half_width: 9,
        temporal_half_width: 9,
        aligned: 1,
        ..AttentionParams::default()
    };
    // SAFETY: the structure is `repr(C)` without padding.
    let bytes =
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&params).cast::<u8>(), size_of::<AttentionParams>()) };
    let resources = kernels.manifest().kernels.iter().find(|kernel| kernel.entry == "attention").unwrap();
    let config = LaunchConfig { grid: [1; 3], block: [resources.threads, 1, 1], shared_bytes: resources.shared_bytes };
    let module = Module::parse("many_keys", kernels.ptx()).unwrap();
    module.launch_with(&memory, "attention", config, bytes, Options { seed, ..Options::default() }).unwrap();

    let found = memory.read(out, out_bytes as u64).unwrap();
    let found = |row: usize, channel: usize| {
        let at = 2 * (row * head_dim as usize + channel);
        widen(Dtype::F16, u16::from_le_bytes([found[at], found[at + 1]]))
    };
    let (mut sum, mut count) = (0.0, 0.0);
    for row in ROWS {
        let query: Vec<f64> = queries.row(row).collect();
        let score = |key: usize| -> f64 { keys.row(key).zip(&query).map(|(k, q)| k * q).sum() };
        let scores: Vec<f64> = (0..KEYS).map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut weights, mut expected) = (0.0, vec![0.0; head_dim as usize]);
        for (key, score) in scores.iter().enumerate() {
            let weight = (score - largest).exp2();
            weights += weight;
            expected.iter_mut().zip(values.row(key)).for_each(|(sum, value)| *sum += weight * value);
        }
        for (channel, sum_of_channel) in expected.into_iter().enumerate() {
            let expected = sum_of_channel / weights;
            let error = (found(row, channel) - expected) / expected;
            assert!(error.abs() < 1.5 / 1024.0, "seed {seed}, row {row}, channel {channel}: {error}");
            (sum, count) = (sum + error, count + 1.0);
        }
    }
    let mean: f64 = sum / count;
    println!("head dim {head_dim}, seed {seed}: mean error {mean:.2e}");
    assert!(mean.abs() < 1e-4, "seed {seed}: mean error {mean}");
}

fn fresh_seed() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into()
}

/// One accumulator would lose 2.1e-4.
#[test]
fn plain_rows() {
    for head_dim in [128, 64] {
        compare(head_dim, fresh_seed(), |_| 0.0);
    }
}

/// Scores that grow along the keys, so that offsets are lowered between anchors.
#[test]
fn rising_scores() {
    compare(128, fresh_seed(), |key| 40.0 * key as f64 / KEYS as f64);
}

/// Weights that are too large from the key tile on before which anchors are put: plain rows have
/// put them then, and rows with offsets put them again.
#[test]
fn offsets_from_an_anchor_on() {
    compare(128, fresh_seed(), |key| if key < ANCHOR_TILES as usize * 176 { 0.0 } else { 20.0 });
}
