//! The resource use of several groups together.

use serde_json::{Number, Value};

use super::Stats;
use crate::error::{Error, Result};

impl Stats {
    /// Adds up what these use; in the form of the first, so what is in the other form does not count. `None` for none.
    ///
    /// # Errors
    /// Not expected: what is added are numbers of the same fields.
    pub fn sum(all: impl IntoIterator<Item = Self>) -> Result<Option<Self>> {
        let mut all = all.into_iter();
        let Some(first) = all.next() else { return Ok(None) };
        // Some eighty fields in two forms, all of them numbers: field by field as the serialised form names them.
        let same = |other: &Self| std::mem::discriminant(other) == std::mem::discriminant(&first);
        let failed = || Error::failed("add up resource use");
        let mut others = Vec::new();
        for other in all.filter(same) {
            others.push(serde_json::to_value(other).map_err(failed())?);
        }
        let mut sum = serde_json::to_value(first).map_err(failed())?;
        others.into_iter().for_each(|other| add(&mut sum, other));
        serde_json::from_value(sum).map(Some).map_err(failed())
    }
}

/// Numbers are added, lists of numbers element by element, other lists appended (their entries name devices).
fn add(sum: &mut Value, other: Value) {
    match (sum, other) {
        (Value::Number(sum), Value::Number(other)) => *sum = add_numbers(sum, &other),
        (Value::Object(sum), Value::Object(other)) => {
            for (key, value) in other {
                add(sum.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(sum), Value::Array(other)) if other.iter().chain(sum.iter()).all(Value::is_number) => {
            for (index, value) in other.into_iter().enumerate() {
                match sum.get_mut(index) {
                    Some(sum) => add(sum, value),
                    None => sum.push(value),
                }
            }
        }
        (Value::Array(sum), Value::Array(other)) => sum.extend(other),
        (sum @ Value::Null, other) => *sum = other,
        // A name, the same in both.
        _ => {}
    }
}

/// Counters and bytes are whole numbers; others are averages of stalls in percent, of which the worst stands for all.
fn add_numbers(one: &Number, other: &Number) -> Number {
    match (one.as_u64(), other.as_u64()) {
        (Some(one), Some(other)) => one.saturating_add(other).into(),
        _ => {
            let worst = one.as_f64().unwrap_or(0.0).max(other.as_f64().unwrap_or(0.0));
            Number::from_f64(worst).unwrap_or_else(|| 0.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{v1, v2};

    #[test]
    fn numbers_are_added_in_either_form() {
        let one = |usage, per_cpu: &[u64], device: &str| {
            let entry = v1::BlkIoEntry { op: "Read".into(), device: device.into(), value: 7, ..Default::default() };
            let usage_now = v1::MemoryEntry { limit: u64::MAX, usage, ..Default::default() };
            Stats::V1(Box::new(v1::Stats {
                cpu: Some(v1::CpuStat {
                    usage: Some(v1::CpuUsage { total: usage, per_cpu: per_cpu.to_vec(), ..Default::default() }),
                    throttling: None,
                }),
                memory: Some(v1::MemoryStat { usage: Some(usage_now), ..Default::default() }),
                blkio: Some(v1::BlkIoStat { io_service_bytes_recursive: vec![entry], ..Default::default() }),
                ..Default::default()
            }))
        };
        let Some(Stats::V1(sum)) = Stats::sum([one(3, &[1, 2], "a"), one(4, &[4], "b")]).unwrap() else { panic!("a sum") };
        let cpu = sum.cpu.unwrap().usage.unwrap();
        assert_eq!((cpu.total, cpu.per_cpu.as_slice()), (7, &[5, 2][..]));
        let memory = sum.memory.unwrap().usage.unwrap();
        assert_eq!((memory.usage, memory.limit), (7, u64::MAX));
        assert_eq!(sum.blkio.unwrap().io_service_bytes_recursive.len(), 2);

        let two = |usage, avg10, pids: Option<u64>| {
            let psi = Some(v2::PsiStats { some: Some(v2::PsiData { avg10, ..Default::default() }), full: None });
            Stats::V2(Box::new(v2::Stats {
                memory: Some(v2::MemoryStat { usage, psi, ..Default::default() }),
                pids: pids.map(|current| v2::PidsStat { current, limit: 9 }),
                ..Default::default()
            }))
        };
        let all = [two(1, 0.5, None), one(9, &[], "c"), two(2, 2.5, Some(3))];
        let Some(Stats::V2(sum)) = Stats::sum(all).unwrap() else { panic!("a sum") };
        let memory = sum.memory.unwrap();
        assert_eq!((memory.usage, memory.psi.unwrap().some.unwrap().avg10), (3, 2.5));
        assert_eq!(sum.pids.unwrap().current, 3);
        assert_eq!(Stats::sum([]).unwrap(), None);
    }
}
