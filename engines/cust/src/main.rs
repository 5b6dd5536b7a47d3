//! One layer in a context, on a stream and in memory of cust. Only raw handles and addresses cross.
//!
//! It links libcuda, as every program with cust does, and runs where a GPU is:
//!
//! ```text
//! cargo run --release --manifest-path engines/cust/Cargo.toml
//! ```

use std::error::Error;

use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::stream::{Stream, StreamFlags};
use framestride::device::Gpu;
use framestride::shapes::params::Tensor;
use framestride::{Device, HeadTypes, Layer, Module, SparseAttention, Spec, Workspace};

fn main() -> Result<(), Box<dyn Error>> {
    // This is the engine's own. Dropped last, it outlives everything that borrows it.
    let context = cust::quick_init()?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;

    // SAFETY: the context outlives the device and all that is made with it.
    let device = Device::from(unsafe { Gpu::borrow(context.as_raw().cast())? });
    let module = Module::load(&device, &Spec::shipped("tiny_plain")?)?;
    let spec = module.spec();
    let attention = SparseAttention::new(&module, spec.batch, spec.heads)?;

    // cust's allocator gives the tensors, [B, S, H, D] in bf16, and the workspace.
    let (sequence, heads, head_dim) = (spec.layout.sequence(), spec.heads, spec.head_dim);
    let elements = (spec.batch * sequence * heads * head_dim) as usize;
    let qk = DeviceBuffer::from_slice(&vec![0_u16; elements])?;
    let v = DeviceBuffer::from_slice(&vec![ONE; elements])?;
    let out = DeviceBuffer::from_slice(&vec![0_u16; elements])?;
    let workspace_bytes = attention.workspace_bytes();
    // SAFETY: kernels write every byte of the workspace before they read it.
    let workspace = unsafe { DeviceBuffer::<u8>::uninitialized(workspace_bytes as usize)? };

    let tensor = |data: u64| Tensor {
        data,
        batch: u64::from(sequence * heads * head_dim),
        row: u64::from(heads * head_dim),
        head: u64::from(head_dim),
    };
    let layer = Layer {
        q: tensor(address(&qk)),
        k: tensor(address(&qk)),
        v: tensor(address(&v)),
        out: tensor(address(&out)),
        ..Layer::default()
    };
    // SAFETY: the memory lives until the stream was waited for, and nobody else uses it.
    let borrowed = unsafe { Workspace::borrow(&device, address(&workspace), workspace_bytes) };
    // SAFETY: the stream is one of the borrowed context, and lives until the end.
    let on = unsafe { framestride::Stream::from_raw(stream.as_inner().cast()) };
    // SAFETY: all addresses are memory of this context, which lives until the stream was waited for.
    unsafe { attention.forward(on, &layer, HeadTypes::Profiled, &borrowed)? };
    stream.synchronize()?;

    let mut found = vec![0_u16; elements];
    out.copy_to(&mut found)?;
    assert!(found.iter().all(|&bits| bits == ONE), "every row of V is one, and so is every row of the output");
    println!("all {elements} elements of the output are right");
    Ok(())
}

/// The bits of 1 in bf16.
const ONE: u16 = 0x3f80;

fn address<T: DeviceCopy>(buffer: &DeviceBuffer<T>) -> u64 {
    buffer.as_device_ptr().as_raw()
}
