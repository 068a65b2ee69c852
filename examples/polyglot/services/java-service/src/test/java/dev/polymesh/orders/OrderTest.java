package dev.polymesh.orders;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.math.BigDecimal;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;

class OrderTest {
    private static Order order(String customer, Order.Line... lines) {
        return new Order(null, customer, List.of(lines));
    }

    private static Order.Line line(int quantity, String price) {
        return new Order.Line("book", quantity, new BigDecimal(price));
    }

    @Test
    void total() {
        assertThat(order("a", line(2, "19.99"), line(3, "1.5"), line(1, "0")).total()).isEqualTo("44.48");
    }

    @Test
    void refusesWhatCannotBeDelivered() {
        order("a", line(1, "1.00")).check();
        for (Order wrong : List.of(order(" ", line(1, "1")), order("a"), order("a", line(0, "1")), order("a", line(1, "-1")),
                order("a", line(1, "0.001")), new Order(null, "a", null), order(null, line(1, "1")),
                order("a", new Order.Line("", 1, BigDecimal.ONE)), order("a", new Order.Line("book", 1, null)))) {
            assertThatThrownBy(wrong::check).as(wrong.toString()).isInstanceOf(IllegalArgumentException.class);
        }
    }

    @Test
    void traceOfHeaders() {
        assertThat(Trace.of(Map.of("traceparent", "00-aa-bb-01", "x-b3-traceid", "cc")::get)).isEqualTo(new Trace("aa", "bb"));
        assertThat(Trace.of(Map.of("x-b3-traceid", "cc", "x-b3-spanid", "dd")::get)).isEqualTo(new Trace("cc", "dd"));
        assertThat(Trace.of(Map.of("traceparent", "nonsense")::get)).isEqualTo(new Trace("", ""));
    }

    @Test
    void loginOfUrl() {
        assertThat(Database.Login.of("postgresql://shop:a%40b+c@db.example.com:5433/orders?sslmode=require"))
                .isEqualTo(new Database.Login("jdbc:postgresql://db.example.com:5433/orders?sslmode=require", "shop", "a@b+c"));
        assertThat(Database.Login.of("postgresql://db/orders")).isEqualTo(new Database.Login("jdbc:postgresql://db/orders", null, null));
        // What is wrong may hold a password, so the error does not repeat it.
        assertThatThrownBy(() -> Database.Login.of("mysql://shop:secret@db/orders"))
                .isInstanceOf(IllegalArgumentException.class).hasMessageNotContaining("secret");
    }
}
