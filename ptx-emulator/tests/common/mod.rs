//! What the tests share: a kernel around a body, places in fragments, random numbers, and ptxas.
//!
//! With the path of ptxas in `PTXAS`, ptxas reads every module first that a test runs. So the
//! programs are known to be PTX, and not only what the emulator takes for it.

#![allow(dead_code)]

use ptx_emulator::{Fault, FaultKind, LaunchConfig, Memory, Module, Stats};

/// The head of a module: version, target and address size.
pub const HEADER: &str = ".version 8.3\n.target sm_90a\n.address_size 64\n";

/// The registers that a body may use. At its start `%rd1` is the output, `%rd2` the input, and
/// `%r1` the thread of the block.
const PROLOGUE: &str = "
    .reg .pred %p<32>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>;
    .reg .f32 %f<64>;
    .reg .b64 %rd<64>;
    .reg .f64 %fd<32>;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [in];
    mov.u32 %r1, %tid.x;
";

/// What ptxas says against a module, compiled for the module's target. Nothing if there is no
/// ptxas.
pub fn ptxas(ptx: &str) -> Option<Result<(), String>> {
    let ptxas = std::env::var_os("PTXAS")?;
    let target = ptx.split_once(".target ").and_then(|(_, rest)| rest.split_whitespace().next()).expect("a target");
    let mut path = std::env::temp_dir();
    path.push(format!("ptx-emulator-{}-{:p}.ptx", std::process::id(), ptx));
    std::fs::write(&path, ptx).expect("a temporary file");
    let output = std::process::Command::new(ptxas)
        .args([&format!("-arch={target}"), "-o", "/dev/null"])
        .arg(&path)
        .output()
        .expect("ptxas runs");
    std::fs::remove_file(&path).expect("the temporary file");
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Some(if output.status.success() { Ok(()) } else { Err(said) })
}

/// Gives a module to ptxas if there is one, and parses it.
pub fn module(ptx: &str) -> Module {
    if let Some(Err(said)) = ptxas(ptx) {
        panic!("ptxas refuses the program: {said}\n{ptx}");
    }
    Module::parse("test.ptx", ptx).unwrap_or_else(|error| panic!("{error}"))
}

/// A module with one entry `test(out, in)`. `directives` stand between parameters and body, and
/// `outside` before the entry.
pub fn kernel_with(outside: &str, directives: &str, body: &str) -> String {
    format!(
        "{HEADER}{outside}\n.visible .entry test(.param .u64 out, .param .u64 in)\n{directives}\n{{{PROLOGUE}{body}\nret;\n}}\n"
    )
}

/// A launch of one block.
pub fn one_block(threads: u32, shared_bytes: u32) -> LaunchConfig {
    LaunchConfig { grid: [1, 1, 1], block: [threads, 1, 1], shared_bytes }
}

/// Runs the entry `test` of a module, with an input and an output of `bytes` bytes of zero.
pub fn launch(ptx: &str, launch: LaunchConfig, input: &[u8], bytes: u64) -> Result<(Vec<u8>, Stats), Fault> {
    let module = module(ptx);
    let mut memory = Memory::new();
    let out = memory.alloc(bytes, 1024).expect("memory");
    memory.fill(out, bytes, 0).expect("memory");
    let source = memory.alloc(input.len() as u64, 1024).expect("memory");
    memory.write(source, input).expect("memory");
    let params = [out.to_le_bytes(), source.to_le_bytes()].concat();
    let stats = module.launch(&memory, "test", launch, &params)?;
    Ok((memory.read(out, bytes).expect("memory"), stats))
}

/// Runs a body on one warp. The output is one u32 for each lane.
pub fn warp(body: &str, input: &[u8]) -> Vec<u32> {
    let (out, _) = launch(&kernel_with("", "", body), one_block(32, 0), input, 128).unwrap_or_else(|f| panic!("{f}"));
    u32s(&out)
}

/// Runs a body that must fault, and checks the fault's kind and words of its message.
pub fn fault(
    outside: &str,
    directives: &str,
    body: &str,
    with: LaunchConfig,
    kind: FaultKind,
    words: &[&str],
) -> Fault {
    let found = launch(&kernel_with(outside, directives, body), with, &[0; 4096], 4096);
    let fault = found.expect_err("the kernel must fault");
    let message = fault.to_string();
    assert_eq!(fault.kind, kind, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    fault
}

/// Code that stores a register of each thread to the output.
pub fn store(register: &str) -> String {
    format!("\n mad.wide.u32 %rd60, %r1, 4, %rd1;\n st.global.b32 [%rd60], {register};\n")
}

pub fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

pub fn u64s(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

pub fn bytes32(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The row and the k that the low half of a register of matrix A holds. A warpgroup has 128 threads
/// with four registers each. The high half holds the next k.
///
/// This is the formula of the PTX ISA once more: tests take nothing from the emulator's own.
pub fn place_in_a(thread: usize, register: usize) -> (usize, usize) {
    (16 * (thread / 32) + thread % 32 / 4 + 8 * (register % 2), 2 * (thread % 4) + 8 * (register / 2))
}

/// The row and the column of an accumulator of a warpgroup.
pub fn place_in_d(thread: usize, register: usize) -> (usize, usize) {
    let row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (register % 4 / 2);
    (row, 8 * (register / 4) + 2 * (thread % 4) + register % 2)
}

/// The value of an e4m3 byte, by the formula of the format.
pub fn e4m3(byte: u32) -> f64 {
    let (exponent, fraction) = ((byte >> 3 & 15) as i32, (byte & 7) as f64 / 8.0);
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction * 2f64.powi(-6),
        _ => (1.0 + fraction) * 2f64.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The generator splitmix64 (Steele, Lea and Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A uniform number in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
