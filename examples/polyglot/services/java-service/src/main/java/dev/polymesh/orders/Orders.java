package dev.polymesh.orders;

import java.math.BigDecimal;
import java.util.Map;
import org.springframework.beans.factory.ObjectProvider;
import org.springframework.http.HttpStatus;
import org.springframework.http.ResponseEntity;
import org.springframework.web.bind.annotation.ExceptionHandler;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PathVariable;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RequestBody;
import org.springframework.web.bind.annotation.RequestMapping;
import org.springframework.web.bind.annotation.ResponseStatus;
import org.springframework.web.bind.annotation.RestController;

/** Orders over HTTP. */
@RestController
@RequestMapping("/api/v1/orders")
class Orders {
    private final OrderStore store; // null without a database

    Orders(ObjectProvider<OrderStore> store) {
        this.store = store.getIfAvailable();
    }

    record Answer(Order order, BigDecimal total) {}

    @PostMapping
    @ResponseStatus(HttpStatus.CREATED)
    Answer add(@RequestBody Order order) {
        order.check();
        Order added = store().add(order);
        return new Answer(added, added.total());
    }

    @GetMapping("/{id}")
    ResponseEntity<Answer> find(@PathVariable long id) {
        return ResponseEntity.of(store().find(id).map(order -> new Answer(order, order.total())));
    }

    private OrderStore store() {
        if (store == null) {
            throw new NoDatabase();
        }
        return store;
    }

    private static class NoDatabase extends RuntimeException {}

    @ExceptionHandler
    @ResponseStatus(HttpStatus.BAD_REQUEST)
    Map<String, String> refused(IllegalArgumentException problem) {
        return Map.of("error", problem.getMessage());
    }

    @ExceptionHandler
    @ResponseStatus(HttpStatus.SERVICE_UNAVAILABLE)
    Map<String, String> unavailable(NoDatabase problem) {
        return Map.of("error", "there is no database: ORDERS_DATABASE_URL is not set");
    }
}
