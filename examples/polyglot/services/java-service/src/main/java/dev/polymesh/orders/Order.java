package dev.polymesh.orders;

import java.math.BigDecimal;
import java.math.RoundingMode;
import java.util.List;

/** What a customer wants to have. The id is the database's; a new order has none. */
public record Order(Long id, String customer, List<Line> lines) {

    public record Line(String product, int quantity, BigDecimal price) {}

    /** Refuses what cannot be delivered or paid. */
    public void check() {
        if (customer == null || customer.isBlank()) {
            throw new IllegalArgumentException("an order needs a customer");
        }
        if (lines == null || lines.isEmpty()) {
            throw new IllegalArgumentException("an order needs at least one line");
        }
        for (Line line : lines) {
            if (line.product() == null || line.product().isBlank()) {
                throw new IllegalArgumentException("a line needs a product");
            }
            if (line.quantity() < 1) {
                throw new IllegalArgumentException("quantity is at least 1");
            }
            if (line.price() == null || line.price().signum() < 0 || line.price().scale() > 2) {
                throw new IllegalArgumentException("price is at least 0 and has at most two decimals");
            }
        }
    }

    public BigDecimal total() {
        return lines.stream()
                .map(line -> line.price().multiply(BigDecimal.valueOf(line.quantity())))
                .reduce(BigDecimal.ZERO, BigDecimal::add)
                .setScale(2, RoundingMode.UNNECESSARY);
    }
}
