//! Files are damaged at random. Each is read as what it says, or is an error.

use std::fs;
use std::path::Path;

use framestride::Kernels;
use framestride::shapes::arch::Arch;
use framestride::shapes::spec::Spec;
use framestride_cli::tensor_files::{load_frames, load_inputs};
use framestride_cli::video;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

/// Number of damaged copies of each file.
const COPIES: u64 = 600;

/// Cuts, flips, overwrites, repeats and inserts bytes. Most damage is in the first `header` bytes,
/// which have a meaning.
fn damage(whole: &[u8], header: usize, generator: &mut Xoshiro256PlusPlus) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..generator.random_range(1..4) {
        let most = if generator.random_range(0..8) == 0 { bytes.len() } else { header.min(bytes.len()) };
        if most == 0 {
            break;
        }
        let at = generator.random_range(0..most);
        match generator.random_range(0..7) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << generator.random_range(0..8),
            2 => bytes[at] = generator.random(),
            // Another digit makes another size, and readers trust sizes.
            3 => {
                if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *digit = b'0' + generator.random_range(0..10u8);
                }
            }
            4 => {
                let piece = bytes[at..most.min(at + 40)].to_vec();
                let to = generator.random_range(0..=at);
                bytes.splice(to..to, piece);
            }
            5 => {
                let number =
                    ["0", "18446744073709551615", "99999999999999999999", "-1", "1e308", "4294967296", "[", "\u{0}"];
                let number = number[generator.random_range(0..number.len())];
                let digits = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |digit| at + digit);
                let end = bytes[digits..]
                    .iter()
                    .position(|byte| !byte.is_ascii_digit())
                    .map_or(bytes.len(), |end| digits + end);
                bytes.splice(digits..end, number.bytes());
            }
            // This damages the length of a header, or whatever else starts a file.
            _ => {
                let length: u64 = [u64::MAX, 1 << 40, 100_000_001, 0, 2][generator.random_range(0..5)];
                bytes.iter_mut().zip(length.to_le_bytes()).for_each(|(byte, length)| *byte = length);
            }
        }
    }
    bytes
}

/// Reads damaged copies. A reader gives the message of its error. Some copies must be refused, or
/// there was no damage.
fn survive(whole: &[u8], header: usize, read: impl Fn(&[u8]) -> Option<String>) {
    assert_eq!(read(whole), None, "the whole file is right");
    let mut refused = 0;
    for seed in 0..COPIES {
        let damaged = damage(whole, header, &mut Xoshiro256PlusPlus::seed_from_u64(seed));
        if let Some(message) = read(&damaged) {
            refused += 1;
            assert!(message.len() <= 2048, "seed {seed}: {} bytes", message.len());
            assert!(message.chars().all(|c| c == '\n' || !c.is_control()), "seed {seed}: {message:?}");
        }
    }
    assert!(refused > COPIES / 2, "{refused} of {COPIES}");
}

fn shipped(name: &str) -> (&'static str, Spec) {
    let (_, text) = framestride::shapes::models().iter().find(|(found, _)| *found == name).unwrap();
    (text, Spec::parse(name, text).unwrap())
}

fn tensors(tensors: &[(&str, Dtype, &[usize])]) -> (Vec<u8>, usize) {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, dtype, shape)| vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8])
        .collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, dtype, shape), data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    (bytes, header)
}

fn with_file<T>(bytes: &[u8], read: impl Fn(&Path) -> framestride::Result<T>) -> Option<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    read(file.path()).err().map(|error| error.to_string())
}

#[test]
fn tensor_files() {
    let (_, spec) = shipped("tiny_text_last");
    let (bytes, header) = tensors(&[
        ("query", Dtype::F32, &[1, 2, 139, 64]),
        ("key", Dtype::BF16, &[1, 139, 2, 64]),
        ("v", Dtype::F16, &[1, 139, 128]),
        ("freqs_cos", Dtype::F32, &[115, 64]),
        ("sin", Dtype::F64, &[115, 32]),
        ("attn.norm_q.weight", Dtype::F32, &[64]),
        ("text_lengths", Dtype::I64, &[1]),
    ]);
    survive(&bytes, header, |bytes| with_file(bytes, |path| load_inputs(path, &spec)));
}

#[test]
fn videos() {
    let (_, spec) = shipped("tiny_plain");
    let grid = spec.grid.unwrap().map(|side| side as usize);
    let (bytes, header) =
        tensors(&[("frames", Dtype::U8, &[spec.layout.frames.value as usize, grid[0], 2 * grid[1], 3])]);
    survive(&bytes, header, |bytes| with_file(bytes, |path| video::inputs(&spec, 1, &load_frames(path)?, "video")));
}

#[test]
fn specs() {
    let (text, _) = shipped("tiny_heads_sinks");
    survive(text.as_bytes(), text.len(), |bytes| {
        with_file(bytes, |path| Spec::from_file(path).map_err(framestride::Error::from))
    });
}

#[test]
fn manifests() {
    let kernels = Kernels::for_spec(&Spec::shipped("tiny_text_last").unwrap(), Arch::default()).unwrap();
    let json = kernels.manifest().to_json();
    survive(json.as_bytes(), json.len(), |bytes| {
        let text = String::from_utf8_lossy(bytes);
        Kernels::parse("damaged.json", kernels.ptx(), &text).err().map(|error| error.to_string())
    });
}
