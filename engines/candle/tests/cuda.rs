//! What only a GPU shows: streams, devices, how long kernels live, and results of head dim 128 beside
//! those of the CPU. Without a GPU these tests fail.
//!
//! `cargo test --release --features cuda,emulator` runs the other tests on the GPU too.

#[expect(dead_code, reason = "other tests compare a case with the CPU")]
mod case;
mod common;

use candle_core::{DType, Device, Result, Tensor};
use case::{Case, attended, bits, on_the_cpu};
use common::{device, rows};
use framestride_candle::shapes::spec::Compute;
use framestride_candle::{Attention, HeadTypes, Spec};

/// Dense attention of a spec without norm, RoPE and text, and tensors for it.
fn plain(compute: Compute) -> Result<(Attention, [Tensor; 3])> {
    let device = device()?;
    let spec = Spec::shipped("tiny_plain").expect("it is shipped").to_builder().compute(compute).build();
    let mut attention = Attention::load(&device, &spec.expect("the spec is right"))?;
    attention.head_types = HeadTypes::Dense;
    let [q, k, v] = [0.7, 1.3, 0.2].map(|seed| rows(seed, (2, 384, 3, 128), DType::BF16, &device));
    // Twice as large, Q and K have scores like those of normal numbers.
    Ok((attention, [(q? * 2.0)?, k?, v?]))
}

/// The norm of the difference to softmax attention over the norm of that.
fn relative_error(out: &Tensor, qkv: &[Tensor; 3]) -> Result<f32> {
    let [q, k, v] = qkv.each_ref().map(|x| on_the_cpu(x)?.transpose(1, 2)?.contiguous());
    let [expected, _] = attended(&q?, &k?, &v?, &Tensor::zeros(1, DType::F32, &Device::Cpu)?)?;
    let norm = |x: &Tensor| x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    Ok(norm(&(on_the_cpu(out)? - &expected)?)? / norm(&expected)?)
}

#[test]
fn plain_heads_are_those_of_the_cpu() -> Result<()> {
    let (attention, qkv) = plain(Compute::Dtype)?;
    let [q, k, v] = &qkv;
    let error = relative_error(&attention.forward(q, k, v)?, &qkv)?;
    // Weights and output are rounded to 8 binary digits.
    assert!(error < 0.005, "{error}");
    Ok(())
}

#[test]
fn heads_in_8_bits_are_near_those_of_the_cpu() -> Result<()> {
    let (attention, qkv) = match plain(Compute::E4m3) {
        // Other GPUs than a Hopper have no such kernels.
        Err(error) if error.to_string().starts_with("attention.compute: found") => {
            println!("left out: {error}");
            return Ok(());
        }
        plain => plain?,
    };
    let [q, k, v] = &qkv;
    let error = relative_error(&attention.forward(q, k, v)?, &qkv)?;
    // Rounding Q, K, V and the weights to 4 binary digits costs about .05.
    assert!(0.005 < error && error < 0.15, "{error}");
    Ok(())
}

#[test]
fn wrong_calls_leave_the_gpu_as_it_was() -> Result<()> {
    let (mut attention, [q, k, v]) = plain(Compute::Dtype)?;
    let expected = bits(&attention.forward(&q, &k, &v)?)?;
    let on_cpu = k.to_device(&Device::Cpu)?;
    let wrong = [
        // candle itself finds this one.
        (attention.forward(&q, &on_cpu, &v), "device mismatch in framestride"),
        (attention.forward_with_output(&q, &on_cpu, &v).map(|output| output.out), "k: found Cpu"),
        (attention.forward(&on_cpu, &on_cpu, &on_cpu), "device: found tensors of Cpu"),
    ];
    for (call, message) in wrong {
        let error = call.map(|out| format!("{out:?}")).expect_err(message).to_string();
        assert!(error.starts_with(message), "{error}");
    }
    attention.head_types = HeadTypes::Given(Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?);
    let error = attention.forward(&q, &k, &v).map(drop).expect_err("types are on the CPU").to_string();
    assert!(error.starts_with("head_types: found Cpu"), "{error}");
    attention.head_types = HeadTypes::Dense;
    assert!(bits(&attention.forward(&q, &k, &v)?)? == expected, "a right call after wrong ones");
    Ok(())
}

/// A copy by way of the CPU, in the memory and the order of a device's stream.
fn copied(x: &Tensor, device: &Device) -> Result<Tensor> {
    x.to_device(&Device::Cpu)?.to_device(device)
}

/// The devices of all tests and of a stream of its own, in both orders, then two of streams of their
/// own.
fn pairs_of_devices() -> Result<[[Device; 2]; 3]> {
    let [default, own, other] = [device()?, Device::new_cuda_with_stream(0)?, Device::new_cuda_with_stream(0)?];
    Ok([[default.clone(), own.clone()], [own.clone(), default], [own, other]])
}

/// Keeps the stream of a device at work for tenths of a second.
fn keep_at_work(device: &Device) -> Result<()> {
    let mut x = Tensor::zeros((8192, 8192), DType::F32, device)?;
    for _ in 0..10 {
        x = x.matmul(&x)?;
    }
    Ok(())
}

/// Calls where `make` makes K on another stream than that of Q, once both have no more work.
///
/// Returns the pairs of devices that give another result than one device.
fn wrong_pairs(make: impl Fn(&Attention, [&Tensor; 3]) -> Result<Tensor>) -> Result<Vec<usize>> {
    let (attention, qkv) = plain(Compute::Dtype)?;
    let [q, k, v] = &qkv;
    let expected = bits(&attention.forward(q, k, v)?)?;
    let mut wrong = Vec::new();
    for (pair, [device, of_k]) in pairs_of_devices()?.iter().enumerate() {
        let (q, k, v) = (copied(q, device)?, copied(k, of_k)?, copied(v, device)?);
        // What is loaded at its first use waits for the GPU, so it is used before.
        for device in [device, of_k] {
            keep_at_work(device)?;
        }
        make(&attention, [&q, &k.neg()?, &v])?;
        for device in [device, of_k] {
            device.synchronize()?;
        }
        if bits(&make(&attention, [&q, &k, &v])?)? != expected {
            wrong.push(pair);
        }
    }
    Ok(wrong)
}

#[test]
fn tensors_of_another_stream_are_waited_for() -> Result<()> {
    let wrong = wrong_pairs(|attention, [q, k, v]| {
        keep_at_work(k.device())?;
        let late = ((k + k)? * 0.5)?;
        attention.forward(q, &late, v)
    })?;
    assert!(wrong.is_empty(), "pairs {wrong:?}");
    Ok(())
}

#[test]
fn memory_of_another_stream_is_kept_until_it_was_read() -> Result<()> {
    let wrong = wrong_pairs(|attention, [q, k, v]| {
        let dropped = k.copy()?;
        k.device().synchronize()?;
        keep_at_work(q.device())?;
        let out = attention.forward(q, &dropped, v)?;
        drop(dropped);
        // The allocator gives the same memory to one of these.
        let _others = [(); 4].map(|()| k.affine(0.0, 3.0));
        Ok(out)
    })?;
    assert!(wrong.is_empty(), "pairs {wrong:?}");
    Ok(())
}

#[test]
fn kernels_are_used_by_all_devices_of_the_gpu() -> Result<()> {
    let case = Case::bf16()?;
    let expected = bits(&case.forward()?)?;
    for device in [device()?, Device::new_cuda_with_stream(0)?] {
        for _ in 0..20 {
            // Weights, tables and lengths are those of the first device.
            let [q, k, v] = case.qkv.each_ref().map(|x| copied(x, &device));
            let [q, k, v] = [q?, k?, v?].map(|x| (&x + &x)? * 0.5);
            assert!(bits(&case.attention.forward(&q?, &k?, &v?)?)? == expected, "{device:?}");
            let mixed = case.attention.forward(&case.qkv[0], &copied(&case.qkv[1], &device)?, &case.qkv[2])?;
            assert!(bits(&mixed)? == expected, "K of {device:?}");
        }
    }
    Ok(())
}

#[test]
fn kernels_are_kept_until_their_work_is_done() -> Result<()> {
    let (attention, qkv) = plain(Compute::Dtype)?;
    let [q, k, v] = &qkv;
    let expected = bits(&attention.forward(q, k, v)?)?;
    let device = Device::new_cuda_with_stream(0)?;
    let [q, k, v] = qkv.each_ref().map(|x| copied(x, &device));
    let (q, k, v) = (q?, k?, v?);
    let mut attention = Attention::load(&device, attention.spec())?;
    attention.head_types = HeadTypes::Dense;
    keep_at_work(&device)?;
    let out = attention.forward(&q, &k, &v)?;
    drop(attention);
    assert!(bits(&out)? == expected);
    Ok(())
}
