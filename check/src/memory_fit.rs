//! How many heads of a layer `verify` can launch at a time in the memory that is free.

use framestride::device::available_memory;
use framestride::shapes::spec::Spec;
use framestride::{Device, Error, Result, workspace_layout};

use crate::device_tensors::{Arrangement, Placement};

/// Bytes of memory that are free, or `None` where that is not known. The emulator's memory is the
/// host's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Free {
    device: Option<u64>,
    host: Option<u64>,
}

/// Bytes of memory that something takes at its peak.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Need {
    pub device: u64,
    pub host: u64,
}

/// One part in so many of all memory is left alone, since allocations are rounded up, and others
/// allocate too.
const SPARE: u64 = 32;

impl Free {
    pub fn of(device: &Device) -> Result<Free> {
        let device = if let Device::Gpu(gpu) = device { Some(gpu.free_memory()?) } else { None };
        Ok(Free { device, host: available_memory() })
    }

    fn holds(self, need: Need) -> bool {
        let holds = |free: Option<u64>, need: u64| free.is_none_or(|free| need <= free - free / SPARE);
        match self.device {
            Some(device) => holds(Some(device), need.device) && holds(self.host, need.host),
            None => holds(self.host, need.device + need.host),
        }
    }

    /// The largest batch and number of heads that fit: `wanted`, or half of it, and so on.
    ///
    /// A norm over all heads needs all of them, so the batch is halved instead.
    pub fn fit(self, spec: &Spec, wanted: [u32; 2], need: impl Fn([u32; 2]) -> Need) -> Result<[u32; 2]> {
        let mut extent = wanted;
        while !self.holds(need(extent)) {
            extent = match extent {
                [batch, heads] if heads > 1 && !spec.norm_is_over_heads() => [batch, heads.div_ceil(2)],
                [batch, heads] if batch > 1 => [batch.div_ceil(2), heads],
                _ => return Err(self.no_room(spec, extent, need(extent))),
            };
        }
        Ok(extent)
    }

    fn no_room(self, spec: &Spec, [batch, heads]: [u32; 2], need: Need) -> Error {
        let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        let free = |bytes: Option<u64>| bytes.map_or("an unknown amount".into(), gigabytes);
        let (found, allowed) = match self.device {
            Some(device) => (
                format!("{} of the device's memory and {} of the host's", gigabytes(need.device), gigabytes(need.host)),
                format!("{} and {}, less a {SPARE}th: what is free", gigabytes(device), free(self.host)),
            ),
            None => (
                format!("{} of memory", gigabytes(need.device + need.host)),
                format!("{}, less a {SPARE}th: what is free", free(self.host)),
            ),
        };
        Error::input(
            format!("spec {}, {batch} x {heads} heads", spec.name),
            found,
            allowed,
            "Take a machine with more memory, or a spec with fewer frames or heads",
        )
    }
}

/// Bytes of Q, K, V and the output of a launch.
fn tensors(spec: &Spec, [batch, heads]: [u32; 2], placement: Placement) -> u64 {
    placement.bytes(&spec.layout, [batch, heads, spec.head_dim].map(|extent| extent as usize))
}

/// Bytes of the log-sum-exps of a launch.
fn log_sums(spec: &Spec, [batch, heads]: [u32; 2]) -> u64 {
    u64::from(batch) * u64::from(heads) * u64::from(spec.layout.sequence()) * 4
}

/// Bytes of the RoPE tables of a launch, in which each batch item has its own.
fn rope_tables(spec: &Spec, [batch, heads]: [u32; 2]) -> u64 {
    u64::from(batch) * spec.rope_table_bytes(heads)
}

/// Bytes that layers and workspaces take on the device, where there are `layers` and `workspaces`
/// of them.
fn on_device(
    spec: &Spec,
    device: &Device,
    extent: [u32; 2],
    placement: Placement,
    [layers, workspaces]: [u64; 2],
) -> u64 {
    let [batch, heads] = extent;
    let layer = tensors(spec, extent, placement) + log_sums(spec, extent) + rope_tables(spec, extent);
    // Workspaces of other families differ by less than what is spared.
    let arch = device.arch().unwrap_or_default();
    layers * layer + workspaces * workspace_layout(spec, arch, batch, heads, device.multiprocessors()).bytes
}

/// What a layer needs that is compared with the f64 reference.
///
/// The host holds its inputs, and its results as they lie on the device. It holds one head as f64,
/// packed and not, with what masks say of each of its rows.
pub(crate) fn compared(spec: &Spec, device: &Device, extent: [u32; 2], placement: Placement) -> Need {
    let [batch, heads] = extent;
    let (row, tensor) = (u64::from(spec.head_dim), spec.tensor_bytes(batch, heads));
    let of_row = 3 * 8 * row + 3 * u64::from(spec.dtype.bytes()) * row + 8 * 64;
    let one_head = u64::from(spec.layout.sequence()) * of_row;
    let statistics = 2 * 16 * u64::from(batch) * u64::from(spec.layout.sequence());
    // Q, K and V take at least three tensors, so the rest bounds the output in its arrangement.
    let out = tensors(spec, extent, placement).saturating_sub(3 * tensor);
    let host = 3 * tensor + rope_tables(spec, extent) + out + log_sums(spec, extent) + statistics + one_head;
    Need { device: on_device(spec, device, extent, placement, [1, 1]), host }
}

/// What layers need that are compared with themselves. `counts` are those of layers and workspaces,
/// and the host keeps `results`.
pub(crate) fn repeated(spec: &Spec, device: &Device, extent: [u32; 2], counts: [u64; 2], results: u64) -> Need {
    let [batch, heads] = extent;
    let tensor = spec.tensor_bytes(batch, heads);
    let inputs = 3 * tensor + rope_tables(spec, extent);
    let results = (results + 1) * (tensor + log_sums(spec, extent));
    let placement = Placement::all(Arrangement::TokensFirst);
    Need { device: on_device(spec, device, extent, placement, counts), host: inputs + results }
}

#[cfg(test)]
mod tests {
    use framestride::Device;
    use framestride::shapes::spec::Spec;

    use super::{Free, Need, compared, repeated};
    use crate::device_tensors::{Arrangement, Placement};

    const GIGABYTE: u64 = 1_000_000_000;

    /// 81 latent frames of Wan.
    fn spec(norm: &str) -> Spec {
        let text = format!(
            "name = \"long\"\n[video]\nframes = 81\ntokens_per_frame = 3600\n[attention]\nheads = 40\nhead_dim = 128\nbatch = 2\n
             {norm}\n[masks.spatial]\ndensity = 0.25\n[masks.temporal]\ndensity = 0.25\n"
        );
        Spec::parse("long", &text).unwrap()
    }

    #[test]
    fn a_layer_takes_what_its_tensors_take() {
        let (spec, device) = (spec(""), Device::emulator());
        let tensor = 2 * 291_600 * 40 * 128 * 2;
        let Need { device, host } = compared(&spec, &device, [2, 40], Placement::all(Arrangement::TokensFirst));
        // The device holds four tensors, and three packed ones with little beside them. The host
        // holds three and the output.
        assert!((7 * tensor..8 * tensor).contains(&device), "{device}");
        assert!((4 * tensor..5 * tensor).contains(&host), "{host}");
    }

    #[test]
    fn fewer_heads_fit() {
        let (spec, device) = (spec(""), Device::emulator());
        let need = |extent| repeated(&spec, &device, extent, [5, 2], 4);
        let free = |gigabytes| Free { device: Some(gigabytes * GIGABYTE), host: Some(1000 * GIGABYTE) };
        let [batch, heads] = free(80).fit(&spec, [2, 40], need).unwrap();
        assert!(batch == 2 && (5..40).contains(&heads), "{heads}");
        assert!(need([batch, heads]).device < 80 * GIGABYTE && need([batch, 2 * heads]).device > 77 * GIGABYTE);
        assert_eq!(free(1000).fit(&spec, [2, 40], need).unwrap(), [2, 40]);
        let error = free(1).fit(&spec, [2, 40], need).unwrap_err().to_string();
        assert!(error.contains("GB") && error.contains("1 x 1 heads"), "{error}");
    }

    #[test]
    fn a_norm_over_all_heads_gives_up_batch_items() {
        let (spec, device) = (spec("[qk_norm]\nkind = \"rms\"\nover = \"heads\""), Device::emulator());
        let need = |extent| compared(&spec, &device, extent, Placement::all(Arrangement::Unaligned));
        let free = Free { device: Some(30 * GIGABYTE), host: None };
        assert_eq!(free.fit(&spec, [2, 40], need).unwrap(), [1, 40]);
        assert!(Free { device: None, host: Some(GIGABYTE) }.fit(&spec, [2, 40], need).is_err());
    }
}
