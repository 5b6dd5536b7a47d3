//! One sparse attention layer, on GPU 0 if it runs the kernels, else in the emulator.
//!
//! ```text
//! cargo run --release --example one_layer
//! ```

use framestride::device::Gpu;
use framestride::shapes::params::Tensor;
use framestride::{Device, HeadTypes, Layer, Module, Result, SparseAttention, Spec, Stream, Workspace};

fn main() -> Result<()> {
    let gpu = Gpu::primary(0).and_then(|gpu| gpu.arch().map(|_| gpu));
    let device = gpu.map_or_else(
        |reason| {
            println!("on the emulator, since there is {reason}");
            Device::emulator()
        },
        Device::from,
    );

    // The kernels of one model. The spec says what the model's attention looks like.
    let module = Module::load(&device, &Spec::shipped("tiny_plain")?)?;
    let spec = module.spec();
    let (batch, heads) = (spec.batch, spec.heads);
    let attention = SparseAttention::new(&module, batch, heads)?;
    let workspace = Workspace::allocate(&device, attention.workspace_bytes())?;

    // Q, K, V and the output are [B, S, H, D] in the spec's type, which is bf16 here. An engine has
    // them in its own memory, and passes their addresses and strides.
    let (sequence, head_dim) = (spec.layout.sequence(), spec.head_dim);
    let elements = batch * sequence * heads * head_dim;
    let upload = |value: &dyn Fn(u32) -> f32| {
        let bytes: Vec<u8> = (0..elements).flat_map(|index| bf16(value(index)).to_le_bytes()).collect();
        device.upload(&bytes)
    };
    let q = upload(&|index| (index as f32 * 0.7).sin())?;
    let k = upload(&|index| (index as f32 * 0.3).cos())?;
    let v = upload(&|index| (index % head_dim) as f32)?;
    let out = device.allocate(u64::from(elements) * 2)?;
    let tensor = |address: u64| Tensor {
        data: address,
        batch: u64::from(sequence * heads * head_dim),
        row: u64::from(heads * head_dim),
        head: u64::from(head_dim),
    };

    // For each step and layer: head types from the model's schedule, and one call. It launches the
    // kernels and returns.
    let layer = Layer {
        q: tensor(q.address()),
        k: tensor(k.address()),
        v: tensor(v.address()),
        out: tensor(out.address()),
        ..Layer::default()
    };
    let (step, layer_index) = (10, 3);
    let types: HeadTypes = attention.head_types(step, layer_index);
    // SAFETY: the addresses are memory of this device, of the right size, and live until the end.
    unsafe { attention.forward(Stream::DEFAULT, &layer, types, &workspace)? };

    // Reading waits for the work.
    for profile in attention.read_profile(&workspace)? {
        println!("batch {}, head {}: {}", profile.batch, profile.head, profile.head_type.name());
    }
    let bytes = device.read(&out, 0, out.bytes())?;
    // All rows of V are equal, so every row of the output equals them too, whatever the mask is.
    for (index, bytes) in (0..).zip(bytes.as_chunks().0) {
        let (found, expected) = (f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16), index % head_dim);
        assert!((found - expected as f32).abs() <= 0.01 * expected as f32, "element {index}: {found}");
    }
    println!("all {elements} elements of the output are right");
    Ok(())
}

/// The bits of the nearest bf16 number that is not larger in size.
fn bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs() -> framestride::Result<()> {
        super::main()
    }
}
