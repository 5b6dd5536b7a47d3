//! A layer that is captured in a CUDA graph once, and replayed with new inputs in the same memory.
//!
//! It runs where a GPU is, and says so where none is.
//!
//! ```text
//! cargo run --release --example cuda_graph
//! ```

use std::sync::Arc;

use framestride::device::{Gpu, OwnedStream};
use framestride::shapes::params::Tensor;
use framestride::{Device, HeadTypes, Layer, Module, Result, SparseAttention, Spec, Workspace};

fn main() -> Result<()> {
    let gpu = match Gpu::primary(0).and_then(|gpu| gpu.arch().map(|_| gpu)) {
        Ok(gpu) => Arc::new(gpu),
        Err(reason) => {
            println!("no graph is captured: {reason}");
            return Ok(());
        }
    };
    let device = Device::Gpu(Arc::clone(&gpu));
    let module = Module::load(&device, &Spec::shipped("tiny_plain")?)?;
    let spec = module.spec();
    let attention = SparseAttention::new(&module, spec.batch, spec.heads)?;
    let workspace = Workspace::allocate(&device, attention.workspace_bytes())?;

    // The graph reads and writes this memory at each replay: [B, S, H, D] in bf16.
    let (sequence, heads, head_dim) = (spec.layout.sequence(), spec.heads, spec.head_dim);
    let elements = (spec.batch * sequence * heads * head_dim) as usize;
    let (qk, v) = (device.upload(&vec![0; elements * 2])?, device.allocate(elements as u64 * 2)?);
    let out = device.allocate(elements as u64 * 2)?;
    let tensor = |data: u64| Tensor {
        data,
        batch: u64::from(sequence * heads * head_dim),
        row: u64::from(heads * head_dim),
        head: u64::from(head_dim),
    };
    let (q, k, v_tensor) = (tensor(qk.address()), tensor(qk.address()), tensor(v.address()));
    let layer = Layer { q, k, v: v_tensor, out: tensor(out.address()), ..Layer::default() };

    // A launch allocates nothing and waits for nothing, so it can be captured. Nothing runs here.
    // An engine captures on a stream of its own in the same way.
    let stream = OwnedStream::new(&gpu)?;
    let graph = stream.capture(|stream| {
        // SAFETY: module, memory and workspace live until the end, and only the replays use them.
        unsafe { attention.forward(stream, &layer, HeadTypes::Profiled, &workspace) }
    })?;

    for (value, bits) in [(1.0, 0x3f80_u16), (2.0, 0x4000), (-3.0, 0xc040)] {
        let ordered = bits.to_le_bytes().repeat(elements);
        device.write(&v, 0, &ordered)?;
        // The stream does not wait for the default one, on which the copy was made.
        device.synchronize()?;
        // SAFETY: everything that was captured is live, and the read below waits for the replay.
        unsafe { graph.launch(stream.borrow())? };
        assert_eq!(device.read(&out, 0, out.bytes())?, ordered, "every row of V is {value}, and so is the output");
        println!("replayed with {value}: all {elements} elements of the output are right");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs_where_a_gpu_is() -> framestride::Result<()> {
        super::main()
    }
}
