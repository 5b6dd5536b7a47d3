//! The device of the tests, and tensors on it.

use candle_core::{DType, Device, Result, Shape, Tensor};

/// A GPU when the tests are built for one, else the CPU with its emulator.
pub fn device() -> Result<Device> {
    if cfg!(feature = "cuda") { Device::new_cuda(0) } else { Ok(Device::Cpu) }
}

/// Numbers of -1 to 1 that follow no simple rule. The same seed gives the same numbers.
pub fn wave(seed: f64, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let number = |index: usize| ((index as f64 + 1.0) * (index % 97 + 1) as f64 * seed).sin() as f32;
    Tensor::from_vec((0..shape.elem_count()).map(number).collect(), shape, device)
}

/// Such numbers in a type of 16 bits.
pub fn rows(seed: f64, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    wave(seed, shape, device)?.to_dtype(dtype)
}
