package dev.polymesh.orders;

import java.sql.ResultSet;
import java.util.List;
import java.util.Optional;
import org.springframework.jdbc.core.simple.JdbcClient;
import org.springframework.transaction.annotation.Transactional;

/** The orders in PostgreSQL. Database makes it, where there is one. */
public class OrderStore {
    private final JdbcClient db;

    public OrderStore(JdbcClient db) {
        this.db = db;
    }

    /** An order is there with all its lines or not at all. */
    @Transactional
    public Order add(Order order) {
        long id = db.sql("INSERT INTO orders (customer) VALUES (?) RETURNING id")
                .param(order.customer())
                .query(Long.class)
                .single();
        int position = 0;
        for (Order.Line line : order.lines()) {
            db.sql("INSERT INTO order_lines (order_id, position, product, quantity, price) VALUES (?, ?, ?, ?, ?)")
                    .params(id, ++position, line.product(), line.quantity(), line.price())
                    .update();
        }
        return new Order(id, order.customer(), order.lines());
    }

    @Transactional(readOnly = true)
    public Optional<Order> find(long id) {
        List<Order.Line> lines = db.sql("SELECT product, quantity, price FROM order_lines WHERE order_id = ? ORDER BY position")
                .param(id)
                .query((ResultSet row, int number) -> new Order.Line(row.getString("product"), row.getInt("quantity"), row.getBigDecimal("price")))
                .list();
        return db.sql("SELECT customer FROM orders WHERE id = ?")
                .param(id)
                .query(String.class)
                .optional()
                .map(customer -> new Order(id, customer, lines));
    }
}
