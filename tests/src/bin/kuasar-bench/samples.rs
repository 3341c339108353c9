//! Repeated measurements of one thing, and what to say of them.

/// Measured values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

/// What the table shows of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figure {
    /// The median, or the only value there is.
    pub(crate) value: f64,
    /// Below it lie 95 of 100, where there are enough to say so.
    pub(crate) p95: Option<f64>,
}

impl Figure {
    /// Of something that was measured once.
    pub(crate) fn once(value: f64) -> Self {
        Self { value, p95: None }
    }
}

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Median alone.
    pub(crate) fn median(&self) -> Option<Figure> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let upper = *sorted.get(sorted.len() / 2)?;
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Figure { value: (lower + upper) / 2.0, p95: None })
    }

    /// Median and 95th percentile by nearest rank (of few samples: the largest).
    pub(crate) fn figure(&self) -> Option<Figure> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        // ceil(0.95 n), from 1
        let rank = (sorted.len() * 95).div_ceil(100);
        Some(Figure { p95: sorted.get(rank.checked_sub(1)?).copied(), ..self.median()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u8>) -> Samples {
        Samples(values.into_iter().map(f64::from).collect())
    }

    #[test]
    fn median_and_p95() {
        assert_eq!(of([]).figure(), None);
        assert_eq!(of([7]).figure(), Some(Figure { value: 7.0, p95: Some(7.0) }));
        assert_eq!(of([4, 1, 3, 2]).figure(), Some(Figure { value: 2.5, p95: Some(4.0) }));
        assert_eq!(of((1..=100).rev()).figure(), Some(Figure { value: 50.5, p95: Some(95.0) }));
        assert_eq!(of([9, 1, 5]).median(), Some(Figure::once(5.0)));
    }
}
