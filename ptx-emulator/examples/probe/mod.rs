//! What the probes share: they run dot products on a GPU, and compare the emulator with what the GPU
//! computed.
//!
//! | command | what it does |
//! | --- | --- |
//! | `PROBE gpu FILE` | runs them on the first GPU, and writes the results |
//! | `PROBE compare FILE` | counts in how many accumulators of each case the emulator differs |
//! | `PROBE dump FILE PART` | writes operands and results of cases with PART in their name |
//! | `PROBE ptx` | writes the program |
//!
//! `dump` helps to fit another arithmetic to the results of another GPU.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/tensor_core.rs"]
pub mod tensor_core;

use cudarc::driver::{result, sys};
use ptx_emulator::Module;
use std::error::Error;
use std::ffi::{CString, c_void};
use std::process::ExitCode;
use tensor_core::{Case, Kept, Results};

/// A program, and the cases that it computes.
pub struct Probe {
    pub name: &'static str,
    /// The GPUs that the program runs on.
    pub gpus: &'static str,
    pub program: String,
    pub cases: Vec<Case>,
}

/// The first GPU, with the program loaded.
struct Gpu {
    device: String,
    module: sys::CUmodule,
    stream: sys::CUstream,
}

impl Gpu {
    fn new(probe: &Probe) -> Result<Gpu, Box<dyn Error>> {
        // SAFETY: the call opens the driver's library and closes it again, and keeps nothing of it.
        if !unsafe { sys::is_culib_present() } {
            return Err(format!("the CUDA driver (libcuda) is not installed: `gpu` needs {}", probe.gpus).into());
        }
        result::init()?;
        let device = result::device::get(0)?;
        let mut version = 0;
        // SAFETY: the context stays retained until the process ends, and `version` is a live local.
        unsafe {
            let context = result::primary_ctx::retain(device)?;
            result::ctx::set_current(context)?;
            sys::cuDriverGetVersion(&mut version).result()?;
        }
        let driver = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let driver = driver.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        let device = format!(
            "{}, driver {}, CUDA {}.{}",
            result::device::get_name(device)?,
            driver.unwrap_or("unknown"),
            version / 1000,
            version % 1000 / 10
        );
        let text = CString::new(probe.program.as_str())?;
        // SAFETY: the text is PTX that ends with a zero.
        let module = unsafe { result::module::load_data(text.as_ptr() as *const c_void)? };
        Ok(Gpu { device, module, stream: result::stream::create(result::stream::StreamKind::Default)? })
    }

    fn run(&self, case: &Case) -> Result<Vec<u32>, Box<dyn Error>> {
        let c = case.image_of_c();
        let mut out = vec![0u8; c.len()];
        // SAFETY: every buffer is as large as the program reads or writes for this case, and lives
        // until it has ended.
        unsafe {
            let function = result::module::get_function(self.module, CString::new(case.entry())?)?;
            let images = [out.clone(), case.image_of_a(), case.image_of_b(), c];
            let mut buffers = Vec::new();
            for image in &images {
                let buffer = result::malloc_sync(image.len())?;
                result::memcpy_htod_sync(buffer, image)?;
                buffers.push(buffer);
            }
            let numbers = case.numbers();
            let pointers = buffers.iter().map(|buffer| buffer as *const sys::CUdeviceptr as *mut c_void);
            let mut params: Vec<*mut c_void> =
                pointers.chain(numbers.iter().map(|number| number as *const u32 as *mut c_void)).collect();
            result::launch_kernel(function, (case.tiles as u32, 1, 1), (128, 1, 1), 0, self.stream, &mut params)?;
            result::stream::synchronize(self.stream)?;
            result::memcpy_dtoh_sync(&mut out, buffers[0])?;
            for buffer in buffers {
                result::free_sync(buffer)?;
            }
        }
        Ok(case.results(&out))
    }
}

/// Runs all cases on the GPU and writes their results.
fn gpu(probe: &Probe, path: &str) -> Result<(), Box<dyn Error>> {
    let gpu = Gpu::new(probe)?;
    let mut results = Results::new(gpu.device.clone());
    for case in &probe.cases {
        let found = gpu.run(case).map_err(|error| format!("{}: {error}", case.name))?;
        if gpu.run(case)? != found {
            return Err(format!("{}: a second run gave other results", case.name).into());
        }
        results.add(case, found);
    }
    let bytes = results.to_bytes();
    std::fs::write(path, &bytes)?;
    println!("{}: {} bytes in {path}", results.device, bytes.len());
    Ok(())
}

/// Compares the emulator with a file of results. Tells whether it agrees everywhere.
fn compare(probe: &Probe, path: &str) -> Result<bool, Box<dyn Error>> {
    let results = Results::from_bytes(&std::fs::read(path)?)?;
    println!("{}", results.device);
    results.check(&probe.cases)?;
    let module = Module::parse("program.ptx", &probe.program)?;
    let mut agrees = true;
    for case in &probe.cases {
        let expected = results.of(case)?;
        let found = case.emulate(&module);
        let differ: Vec<usize> = (0..found.len()).filter(|i| found[*i] != expected[*i]).collect();
        let kind = if case.kept == Kept::Bits { "accumulators" } else { "words of digests" };
        let mark = if differ.is_empty() { "ok  " } else { "DIFF" };
        println!("{mark}  {}: {} of {} {kind} differ", case.name, differ.len(), found.len());
        agrees &= differ.is_empty();
        if let (Kept::Bits, Some(at)) = (case.kept, differ.first()) {
            let (a, b, c) = case.operands(*at, 0);
            println!("      GPU {:08x}, emulator {:08x} at {at}: C {c:08x}", expected[*at], found[*at]);
            println!("      A {a:04x?}\n      B {b:04x?}");
        }
    }
    Ok(agrees)
}

/// Writes a line for each accumulator of the cases of one step: the case, the result, C, A and B,
/// in hexadecimal.
fn dump(probe: &Probe, path: &str, part: &str) -> Result<(), Box<dyn Error>> {
    let results = Results::from_bytes(&std::fs::read(path)?)?;
    let words = |bits: Vec<u32>| bits.iter().map(|x| format!("{x:x}")).collect::<Vec<_>>().join(",");
    for case in &probe.cases {
        if case.steps != 1 || case.kept != Kept::Bits || !case.name.contains(part) {
            continue;
        }
        for (i, found) in results.of(case)?.iter().enumerate() {
            let (a, b, c) = case.operands(i, 0);
            println!("{}\t{found:08x}\t{c:08x}\t{}\t{}", case.name, words(a), words(b));
        }
    }
    Ok(())
}

/// Does what the arguments of the process say.
pub fn main(probe: &Probe) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["gpu", path] => gpu(probe, path).map(|()| true),
        ["compare", path] => compare(probe, path),
        ["dump", path, part] => dump(probe, path, part).map(|()| true),
        ["ptx"] => {
            print!("{}", probe.program);
            Ok(true)
        }
        _ => {
            eprintln!("usage: {} gpu FILE | compare FILE | dump FILE PART | ptx", probe.name);
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
