//! One layer in a CUDA context, on a stream and in memory that belong to the engine.
//!
//! The engine uses cudarc here. Any other library will do: all that is borrowed are handles and
//! addresses. It runs where a GPU is, and says so where none is.
//!
//! ```text
//! cargo run --release --example borrowed_context
//! ```

use std::error::Error;

use cudarc::driver::{CudaContext, DevicePtr};
use framestride::device::Gpu;
use framestride::shapes::params::Tensor;
use framestride::{Device, HeadTypes, Layer, Module, SparseAttention, Spec, Stream, Workspace};

fn main() -> Result<(), Box<dyn Error>> {
    // cudarc panics where there is no driver, so this library is asked first.
    if let Err(reason) = Gpu::primary(0).and_then(|gpu| gpu.arch()) {
        println!("nothing to borrow: {reason}");
        return Ok(());
    }
    // This is the engine's own.
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;

    // SAFETY: the context outlives the device and everything that is made with it, since it was
    // made before them.
    let device = Device::from(unsafe { Gpu::borrow(context.cu_ctx().cast())? });
    let module = Module::load(&device, &Spec::shipped("tiny_plain")?)?;
    let spec = module.spec();
    let attention = SparseAttention::new(&module, spec.batch, spec.heads)?;

    // The engine's allocator gives the workspace, and holds the layer's tensors: [B, S, H, D] in
    // bf16.
    let (sequence, heads, head_dim) = (spec.layout.sequence(), spec.heads, spec.head_dim);
    let elements = (spec.batch * sequence * heads * head_dim) as usize;
    let zeros = stream.alloc_zeros::<u16>(elements)?;
    let ones = stream.clone_htod(&vec![0x3f80_u16; elements])?;
    let out = stream.alloc_zeros::<u16>(elements)?;
    let workspace = stream.alloc_zeros::<u8>(attention.workspace_bytes() as usize)?;

    {
        // The guards keep the engine from reusing the memory before the work is done.
        let [(qk, _qk), (v, _v), (to, _out)] = [&zeros, &ones, &out].map(|memory| memory.device_ptr(&stream));
        let (address, _workspace) = workspace.device_ptr(&stream);
        // SAFETY: the memory lives until the end, is large enough, and nobody else uses it.
        let workspace = unsafe { Workspace::borrow(&device, address, attention.workspace_bytes()) };
        let tensor = |data: u64| Tensor {
            data,
            batch: u64::from(sequence * heads * head_dim),
            row: u64::from(heads * head_dim),
            head: u64::from(head_dim),
        };
        let layer = Layer { q: tensor(qk), k: tensor(qk), v: tensor(v), out: tensor(to), ..Layer::default() };
        // SAFETY: the stream is one of the borrowed context, and lives until the end.
        let on = unsafe { Stream::from_raw(stream.cu_stream().cast()) };
        // SAFETY: all addresses are memory of this context, which lives until the work is done.
        unsafe { attention.forward(on, &layer, HeadTypes::Profiled, &workspace)? };
    }

    // The engine goes on with its stream, which has the layer's work in it.
    let found = stream.clone_dtoh(&out)?;
    stream.synchronize()?;
    assert!(found.iter().all(|&bits| bits == 0x3f80), "every row of V is one, and so is every row of the output");
    println!("all {elements} elements of the output are right");
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs_where_a_gpu_is() -> Result<(), Box<dyn std::error::Error>> {
        super::main()
    }
}
