//! What a launch does besides launching, which is nothing, and where profiling writes what it finds.
#![cfg(all(feature = "emulator", feature = "templates"))]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use framestride::shapes::params::Tensor;
use framestride::{Device, Found, HeadTypes, Layer, Module, SparseAttention, Spec, Stream, Text, Workspace};

/// The system's allocator, which counts the calls of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every method is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One item and two heads of 139 rows of 64, with norm, RoPE and text.
struct Setup {
    attention: SparseAttention,
    workspace: Workspace,
    layer: Layer,
    /// The memory of the layer.
    #[allow(dead_code)]
    memory: Vec<framestride::device::Buffer>,
}

fn setup(device: &Device) -> Setup {
    let module = Module::load(device, &Spec::shipped("tiny_text_last").unwrap()).unwrap();
    let attention = SparseAttention::new(&module, 1, 2).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    // Every bf16 is 1 to 2, and likewise every f32.
    let halves: Vec<u8> = (0..139 * 128u32).flat_map(|i| (0x3f80 | (i * 89 % 128) as u16).to_le_bytes()).collect();
    let words: Vec<u8> = (0..115 * 32u32).flat_map(|i| (0x3f80_0000 | (i * 7919 % 0x80_0000)).to_le_bytes()).collect();
    let memory: Vec<_> = [&halves, &halves, &halves, &halves, &words, &words, &vec![0; 139 * 2 * 4], &vec![9, 0, 0, 0]]
        .into_iter()
        .map(|bytes| device.upload(bytes).unwrap())
        .collect();
    let tensor = |index: usize| Tensor { data: memory[index].address(), batch: 0, row: 128, head: 64 };
    let layer = Layer {
        q: tensor(0),
        k: tensor(1),
        v: tensor(2),
        out: tensor(3),
        cos: memory[4].address(),
        sin: memory[5].address(),
        lse: memory[6].address(),
        after: Text { lengths: memory[7].address(), ..Text::default() },
        ..Layer::default()
    };
    Setup { attention, workspace, layer, memory }
}

#[test]
fn a_launch_allocates_nothing() {
    let device = Device::emulator();
    let setup = setup(&device);
    let found = device.allocate(8).unwrap();
    let profiled = Layer { found: Found { head_types: found.address(), ..Found::default() }, ..setup.layer };
    for (layer, types) in [
        (profiled, HeadTypes::Profiled),
        (setup.layer, HeadTypes::Dense),
        (setup.layer, HeadTypes::Given(found.address())),
    ] {
        let before = ALLOCATIONS.get();
        let launches = setup.attention.launches(&layer, types, &setup.workspace);
        assert_eq!(ALLOCATIONS.get() - before, 0, "{types:?}");
        assert_eq!(launches.unwrap().profiling.is_some(), types == HeadTypes::Profiled);
    }
    let before = ALLOCATIONS.get();
    let error = setup.attention.launches(&Layer::default(), HeadTypes::Dense, &setup.workspace).unwrap_err();
    assert!(ALLOCATIONS.get() > before, "an error has a message: {error}");
}

/// What profiling finds is the same wherever it is written, and whether or not attention follows.
#[test]
fn profiling_writes_where_it_is_told() {
    let device = Device::emulator();
    let setup = setup(&device);
    let (types, errors) = (device.allocate(2 * 4).unwrap(), device.allocate(2 * 2 * 4).unwrap());
    let out = |layer: &Layer| {
        // SAFETY: the addresses are memory of this device, which lives until the end.
        unsafe { setup.attention.forward(Stream::DEFAULT, layer, HeadTypes::Profiled, &setup.workspace).unwrap() };
        device.read(&setup.memory[3], 0, 139 * 256).unwrap()
    };
    let found = || {
        let words = |buffer| device.read(buffer, 0, 8).unwrap();
        (words(&types), device.read(&errors, 0, 16).unwrap())
    };
    let mut layer = setup.layer;
    let expected_out = out(&layer);
    let expected = setup.attention.read_profile(&setup.workspace).unwrap();
    let expected = (
        expected.iter().flat_map(|head| (head.head_type as u32).to_le_bytes()).collect::<Vec<u8>>(),
        expected.iter().flat_map(|head| head.errors).flat_map(f32::to_le_bytes).collect::<Vec<u8>>(),
    );

    layer.found = Found { head_types: types.address(), errors: errors.address(), ..Found::default() };
    device.fill(Stream::DEFAULT, setup.workspace.buffer().unwrap(), 0xff).unwrap();
    assert_eq!(out(&layer), expected_out);
    assert_eq!(found(), expected);

    for buffer in [&types, &errors, &setup.memory[3], setup.workspace.buffer().unwrap()] {
        device.fill(Stream::DEFAULT, buffer, 0xff).unwrap();
    }
    layer.out = Tensor::default();
    // SAFETY: as above.
    unsafe { setup.attention.profile(Stream::DEFAULT, &layer, &setup.workspace).unwrap() };
    assert_eq!(found(), expected);
    assert_eq!(device.read(&setup.memory[3], 0, 139 * 256).unwrap(), [0xff; 139 * 256], "no output is written");
}

/// An emulator sums what the kernels of its launches did.
#[test]
fn an_emulator_counts_what_kernels_do() {
    let device = Device::emulator();
    let setup = setup(&device);
    let Device::Emulator(emulator) = &device else { unreachable!("it was just made") };
    assert!(emulator.statistics().is_empty());
    let counts = || {
        // SAFETY: the addresses are memory of this device, which lives until the end.
        unsafe {
            setup.attention.forward(Stream::DEFAULT, &setup.layer, HeadTypes::Dense, &setup.workspace).unwrap();
        }
        let statistics = emulator.statistics();
        let attention = &statistics["attention"];
        (attention.multiply_adds, attention.shared_accesses.values().map(|found| found.accesses).sum::<u64>())
    };
    let (products, accesses) = counts();
    assert!(products > 0 && accesses > 0);
    assert_eq!(counts(), (2 * products, 2 * accesses));
}

/// Kernels use the memory of the process in place, at any multiple of 2 bytes, and nothing beside it.
#[test]
fn memory_of_the_process() {
    let own = Device::emulator();
    let expected = setup(&own);
    // SAFETY: the addresses are memory of this device, which lives until the end.
    let forward = |setup: &Setup| unsafe {
        setup.attention.forward(Stream::DEFAULT, &setup.layer, HeadTypes::Dense, &setup.workspace).unwrap();
    };
    forward(&expected);
    let device = Device::emulator_on_host_memory();
    let mut in_place = setup(&device);
    // Q and the output lie half a word beside words, and others of the same words are not touched.
    let rows = device.read(&in_place.memory[0], 0, 139 * 256).unwrap();
    let mut q = vec![0u16; 139 * 128 + 2];
    for (element, bytes) in q[1..].iter_mut().zip(rows.as_chunks().0) {
        *element = u16::from_le_bytes(*bytes);
    }
    let mut out = vec![0x1234u16; 139 * 128 + 2];
    in_place.layer.q.data = q[1..].as_mut_ptr().expose_provenance() as u64;
    in_place.layer.out.data = out[1..].as_mut_ptr().expose_provenance() as u64;
    forward(&in_place);
    let found: Vec<u8> = out[1..out.len() - 1].iter().flat_map(|element| element.to_le_bytes()).collect();
    assert!(found == own.read(&expected.memory[3], 0, 139 * 256).unwrap());
    assert_eq!((out[0], out[out.len() - 1]), (0x1234, 0x1234));
}
