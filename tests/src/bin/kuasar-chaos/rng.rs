//! Random numbers that a seed gives again: splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).

use std::time::Duration;

/// A sequence of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Another sequence, for a task of its own: what one task draws does not change what the others do.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    /// One of `0..bound`; 0 where that is empty.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    /// Whether the one case out of `of` has come.
    pub(crate) fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// A time of so many milliseconds, `to` not included.
    pub(crate) fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to.saturating_sub(from)))
    }

    /// One of these.
    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(usize::try_from(self.below(of.len() as u64)).unwrap_or(0))
    }

    /// One of these, each as often as its weight says.
    pub(crate) fn weighted<T: Copy>(&mut self, of: &[(T, u64)]) -> Option<T> {
        let mut point = self.below(of.iter().map(|(_, weight)| weight).sum());
        of.iter().find_map(|(value, weight)| {
            let hit = point < *weight;
            point = point.saturating_sub(*weight);
            hit.then_some(*value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_again() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            let mut fork = rng.fork();
            [rng.next(), rng.next(), fork.next()]
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert_eq!(draw(7).iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
    }

    #[test]
    fn weights_are_kept() {
        let mut rng = Rng::new(1);
        let mut drawn = [0; 3];
        for _ in 0..1000 {
            drawn[rng.weighted(&[(0, 90), (1, 10), (2, 0)]).unwrap()] += 1;
        }
        assert!((850..950).contains(&drawn[0]) && drawn[2] == 0, "{drawn:?}");
        assert_eq!(rng.weighted::<u8>(&[]), None);
        assert_eq!(rng.pick::<u8>(&[]), None);
    }
}
